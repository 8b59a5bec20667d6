"""Gates: whether a block runs for a row. The operator that marks one, what scores them, and how they learn."""

from offramp_models.gates.fixed import FixedGates
from offramp_models.gates.gated_pass import GatedPass, GateNotes
from offramp_models.gates.operator import gate
from offramp_models.gates.relaxations import (
    HARD,
    RELAXATIONS,
    Choice,
    GumbelSoftmax,
    Relaxation,
    Sampled,
    SemanticHashing,
    StraightThrough,
    relaxation,
)
from offramp_models.gates.scoring import GATES, FeedForwardGates, Gates, RecurrentGates, Scorer, make_gates

__all__ = [
    "GATES",
    "HARD",
    "RELAXATIONS",
    "Choice",
    "FeedForwardGates",
    "FixedGates",
    "GateNotes",
    "GatedPass",
    "Gates",
    "GumbelSoftmax",
    "RecurrentGates",
    "Relaxation",
    "Sampled",
    "Scorer",
    "SemanticHashing",
    "StraightThrough",
    "gate",
    "make_gates",
    "relaxation",
]
