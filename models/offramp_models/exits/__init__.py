"""Output modules: what stands at the end of a stage and says what the network thinks so far.

Each is built for the shape of the feature map that it reads and the number of classes.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TypeAlias

from torch import nn

from offramp_models.exits.conv_pool import ConvPool
from offramp_models.exits.mixed_pool import MixedPool
from offramp_models.exits.pooled_linear import PooledLinear
from offramp_models.lookup import look_up
from offramp_models.shapes import ImageShape

ExitHead: TypeAlias = Callable[[ImageShape, int], nn.Module]
"""Makes one exit: from the feature map's channels, height and width and the number of classes, a module of logits."""

EXITS: Mapping[str, ExitHead] = MappingProxyType(
    {"conv_pool": ConvPool, "mixed_pool": MixedPool, "pooled_linear": PooledLinear}
)


def exit_head(name: str) -> ExitHead:
    """Give what makes the exits of a name.

    Raises:
        ValueError: If there are no exits of that name; the message lists those there are.
    """
    return look_up(EXITS, "exits", name)


__all__ = ["EXITS", "ConvPool", "ExitHead", "MixedPool", "PooledLinear", "exit_head"]
