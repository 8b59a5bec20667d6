"""Makes what the demo serves: a network trained on handwritten digits, as a bundle that the next run reuses."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from offramp_contract.errors import OfframpError

from offramp_cli.console import stderr
from offramp_cli.export import NUM_EXAMPLES, print_stages, step_by_step
from offramp_cli.train import fit, save

NAME = "digits"
NETWORK = "multi_exit_cnn"


@dataclass(frozen=True, slots=True)
class Recipe:
    """What decides the bundle.

    Attributes:
        seed: For weights, split and order.
        epochs: Passes over the training images.
        threads: Threads to train with; None: one per core.
    """

    seed: int = 0
    epochs: int = 6
    threads: int | None = None


def digits_bundle(folder: Path, recipe: Recipe, fresh: bool) -> Path:
    """Give the digits bundle in a folder; trains and exports it unless one made by the same recipe is there.

    Args:
        folder: The demo's folder; the bundle is `digits` in it.
        recipe: What decides the bundle.
        fresh: Make it anew in any case.
    """
    bundle = folder / NAME
    if not fresh and is_made_by(recipe, bundle):
        stderr.print(f"[green]✓[/] using the bundle in {bundle} (--fresh trains it anew)", highlight=False)
        return bundle
    _make(folder, recipe)
    return bundle


def is_made_by(recipe: Recipe, bundle: Path) -> bool:
    """Say whether a sound bundle is there that was made by a recipe."""
    from offramp_runtime import open_bundle

    try:
        training = open_bundle(bundle).manifest.provenance.training
    except OfframpError:
        return False
    settings = training.get("settings", {})
    return (settings.get("seed"), settings.get("epochs")) == (recipe.seed, recipe.epochs)


def _make(folder: Path, recipe: Recipe) -> None:
    import torch
    from offramp_exporter import export
    from offramp_models import create_network, load_data
    from offramp_models.training import TrainingSettings

    data, network = load_data(NAME, recipe.seed), create_network(NETWORK, recipe.seed)
    settings = TrainingSettings(epochs=recipe.epochs, seed=recipe.seed)
    record = fit(network, data, settings, recipe.threads)
    save(network, record, NETWORK, folder / f"{NAME}.pt")
    if (folder / NAME).exists():  # also one that can no longer be read, which `overwrite` would leave alone
        shutil.rmtree(folder / NAME)
    with step_by_step() as step:
        bundle = export(
            network,
            torch.from_numpy(data.inputs(data.calibration)[:NUM_EXAMPLES]),
            folder / NAME,
            name=NAME,
            labels=data.label_names,
            preprocessing=data.preprocessing,
            training=record.to_json(),
            progress=step,
        )
    print_stages(bundle.manifest)
