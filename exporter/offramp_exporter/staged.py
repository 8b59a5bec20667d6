"""A network given as its parts: a list of stages, and an exit head behind each."""

from collections.abc import Iterable
from typing import Any

import torch
from offramp_contract.errors import TraceError
from torch import nn


class StagedModule(nn.Module):
    """Join stages and exit heads into a network whose `forward` returns every exit's logits.

    Args:
        stages: Stage k takes what stage k - 1 returns; the first takes the network's inputs.
        exit_heads: Head k takes what stage k returns and gives logits, (B, C).

    Raises:
        TraceError: If there are not as many heads as stages.
    """

    def __init__(self, stages: Iterable[nn.Module], exit_heads: Iterable[nn.Module]) -> None:
        super().__init__()
        self.stages, self.exit_heads = nn.ModuleList(stages), nn.ModuleList(exit_heads)
        if not len(self.stages) == len(self.exit_heads) > 0:
            raise TraceError(
                f"a staged module needs one exit head per stage: got {len(self.stages)} stages "
                f"and {len(self.exit_heads)} heads"
            )

    def forward(self, *inputs: torch.Tensor) -> list[torch.Tensor]:
        """Give every exit's logits."""
        hidden: Any = inputs
        logits_EBC = []
        for index, (stage, head) in enumerate(zip(self.stages, self.exit_heads, strict=True)):
            hidden = stage(*hidden) if index == 0 else stage(hidden)
            logits_EBC.append(head(hidden))
        return logits_EBC


def staged_parts(module: nn.Module) -> StagedModule | None:
    """Read a module's own `stages` and `exit_heads`, if it has as many of one as of the other."""
    if isinstance(module, StagedModule):
        return module
    stages, heads = getattr(module, "stages", None), getattr(module, "exit_heads", None)
    lists = (nn.ModuleList, nn.Sequential, list, tuple)
    if not isinstance(stages, lists) or not isinstance(heads, lists) or not len(stages) == len(heads) > 0:
        return None
    if not all(isinstance(part, nn.Module) for part in (*stages, *heads)):
        return None
    return StagedModule(stages, heads)
