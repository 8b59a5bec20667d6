"""How good a network is on some images, and how much of it ran.

Shapes: B = batch, C = classes, E = exits, G = gates.
"""

from dataclasses import dataclass

import torch
from torch import nn

from offramp_models.data import ImageDataSet, LabelledImages
from offramp_models.networks.gated_network import GatedNetwork
from offramp_models.training.settings import GateUse

EVALUATION_BATCH = 256


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What came of some images.

    Attributes:
        accuracy_E: Accuracy of each exit.
        gates: How the gates decided; None for a network without.
    """

    accuracy_E: tuple[float, ...]
    gates: GateUse | None


def evaluate(network: nn.Module, data: ImageDataSet, images: LabelledImages) -> tuple[float, ...]:
    """Measure the accuracy of every exit, all run to the end, in float32; leaves the network in evaluation mode."""
    return measure(network, data, images).accuracy_E


@torch.inference_mode()
def measure(network: nn.Module, data: ImageDataSet, images: LabelledImages) -> Evaluation:
    """Measure the accuracy of every exit and how gates decide; leaves the network in evaluation mode."""
    network.eval()
    device = next(network.parameters()).device
    correct_E: list[int] = []
    decisions: list[torch.Tensor] = []
    for first in range(0, len(images), EVALUATION_BATCH):
        batch = images.rows(slice(first, first + EVALUATION_BATCH))
        labels_B = torch.from_numpy(batch.labels_N).to(device)
        images_BDHW = torch.from_numpy(data.inputs(batch)).to(device)
        if isinstance(network, GatedNetwork):
            passed = network.pass_gates(images_BDHW)
            logits_EBC = passed.logits_EBC
            decisions.append(passed.decisions_BG)
        else:
            logits_EBC = network(images_BDHW)
        hits_E = [int((logits_BC.argmax(1) == labels_B).sum()) for logits_BC in logits_EBC]
        correct_E = [a + b for a, b in zip(correct_E or [0] * len(hits_E), hits_E, strict=True)]
    gates = gate_use(network, torch.cat(decisions)) if isinstance(network, GatedNetwork) else None
    return Evaluation(tuple(correct / len(images) for correct in correct_E), gates)


def gate_use(network: GatedNetwork, decisions_BG: torch.Tensor) -> GateUse:
    """Sum up decisions; one that is between open and shut counts as what it is nearer to."""
    open_BG = (decisions_BG.detach() >= 0.5).float()
    return GateUse(tuple(open_BG.mean(dim=0).tolist()), network.depth_B(open_BG).mean().item())
