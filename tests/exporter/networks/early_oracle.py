"""What a network of `early_networks` does by itself, called as its author would: one row, gradients off."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from early_networks import Thrown
from torch import Tensor

NUM_INPUTS = 200


def images() -> Tensor:
    """Make images of very different contrast and brightness, so that some are easy."""
    generator = torch.Generator().manual_seed(1)
    contrast = torch.exp(torch.randn(NUM_INPUTS, 1, 1, 1, generator=generator) * 1.2)
    noise = torch.randn(NUM_INPUTS, 1, 6, 6, generator=generator)
    return noise * contrast + torch.randn(NUM_INPUTS, 1, 1, 1, generator=generator)


@dataclass(frozen=True)
class Asked:
    """What the network itself did with an input: where it left, by its own name, and what it returned."""

    where: Any
    logits: np.ndarray


def ask(network: Any, x: Tensor) -> list[Asked]:
    """Call the network with one row at a time."""
    asked = []
    for row in x:
        try:
            with torch.no_grad():
                returned = network(row[None].clone())
            where = network.taken
        except Thrown as thrown:
            returned, where = thrown.answer, thrown.index
        asked.append(Asked(where, answer_in(returned).detach().numpy().reshape(-1)))
    return asked


def answer_in(returned: Any) -> Tensor:
    """Find the answer in what a network returned; of probabilities, their logarithm as far as float32 reaches."""
    match returned:
        case Tensor():
            is_probability = torch.allclose(returned.sum(), torch.tensor(1.0))
            return returned.clamp_min(torch.finfo(torch.float32).tiny).log() if is_probability else returned
        case tuple():
            return answer_in(returned[0])
        case list():
            return answer_in(returned[-1])
        case dict():
            return answer_in(returned["logits"])
    return answer_in(returned.logits)
