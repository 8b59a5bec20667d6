"""What gated networks have in common: a pass whose decisions can be seen, and what each gated body costs.

Shapes: B = batch, D = channels, H, W = height and width, C = classes, E = exits, G = gates.
"""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch.utils.flop_counter import FlopCounterMode

from offramp_models.gates import HARD, GatedPass, Relaxation
from offramp_models.networks.image_network import ImageNetwork


class GatedNetwork(ImageNetwork):
    """A network for images with gates; `forward` decides hard, as the network is served.

    Attributes:
        relaxation: A key of `RELAXATIONS`: how its gates decide while they learn, unless told otherwise.
        gate_costs_G: Share of the whole network's FLOPs that each gated body takes; what they leave of 1 is the trunk.
    """

    relaxation: ClassVar[str] = "straight_through"
    gate_costs_G: tuple[float, ...]

    @abstractmethod
    def pass_gates(self, images_BDHW: torch.Tensor, relax: Relaxation = HARD) -> GatedPass:
        """Send a batch through, and say what was decided on its way.

        Args:
            images_BDHW: The images, float32.
            relax: How the gates decide; hard unless told otherwise.
        """

    def forward(self, images_BDHW: torch.Tensor) -> list[torch.Tensor]:
        """Give every exit's logits, each float32 of shape (B, C), the earliest first."""
        return list(self.pass_gates(images_BDHW).logits_EBC)

    def depth_B(self, decisions_BG: torch.Tensor) -> torch.Tensor:
        """Give the share of the network's FLOPs that rows with these decisions run, if they leave at the last exit."""
        costs_G = torch.tensor(self.gate_costs_G, dtype=decisions_BG.dtype, device=decisions_BG.device)
        return 1 - (1 - decisions_BG) @ costs_G


Body = tuple[Callable[[torch.Tensor], torch.Tensor], Sequence[int]]
"""A gated body, and the shape of what it reads, without the batch."""


def shares_of_flops(network: ImageNetwork, bodies_G: Sequence[Body]) -> tuple[float, ...]:
    """Count what share of a network's FLOPs each body takes; leaves the network in training mode, as it is built."""
    network.eval()
    whole = _flops((network, network.input_shape))
    shares_G = tuple(_flops(body) / whole for body in bodies_G)
    network.train()
    return shares_G


@torch.no_grad()
def _flops(body: Body) -> int:
    run, shape = body
    with FlopCounterMode(display=False) as counter:
        run(torch.zeros(1, *shape))
    return int(counter.get_total_flops())
