"""`offramp models`: which networks and data sets there are."""

from rich.table import Table

from offramp_cli.console import stdout


def models() -> None:
    """List the networks that can be trained here, and the data sets to train them on."""
    import torch
    from offramp_models import DATA_SETS, NETWORKS

    table = Table("network", "exits", "parameters", "input", "what it is", box=None, pad_edge=False)
    for name, build in sorted(NETWORKS.items()):
        network = build().eval()
        shape = network.input_shape
        with torch.inference_mode():
            num_exits = len(network(torch.zeros(1, *shape)))
        num_parameters = sum(parameter.numel() for parameter in network.parameters())
        summary = (build.__doc__ or "").partition("\n")[0]
        table.add_row(name, str(num_exits), f"{num_parameters:,}", "x".join(map(str, shape)), summary)
    stdout.print(table)
    stdout.print(f"\ndata sets: {', '.join(sorted(DATA_SETS))}")
