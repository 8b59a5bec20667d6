"""The architectures, one a file. Each can be built without arguments and says which images it takes.

`forward` returns the logits of every exit, in order: that is all the exporter needs to know of a network.
"""

from collections.abc import Mapping
from types import MappingProxyType

import torch

from offramp_models.networks.image_network import ImageNetwork
from offramp_models.networks.multi_exit_cnn import MultiExitCNN

NETWORKS: Mapping[str, type[ImageNetwork]] = MappingProxyType({"multi_exit_cnn": MultiExitCNN})


def create_network(name: str, seed: int = 0) -> ImageNetwork:
    """Build a network with freshly drawn weights.

    Args:
        name: A key of `NETWORKS`.
        seed: Decides the weights; the caller's own random state is left as it was.

    Raises:
        ValueError: If there is no network of that name; the message lists those there are.
    """
    if name not in NETWORKS:
        raise ValueError(f"network {name!r} is not one of {', '.join(sorted(NETWORKS))}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return NETWORKS[name]()


__all__ = ["NETWORKS", "ImageNetwork", "MultiExitCNN", "create_network"]
