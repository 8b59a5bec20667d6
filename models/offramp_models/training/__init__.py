"""How a multi-exit network learns: methods, one loop, its checkpoints, and the accuracy of every exit."""

from offramp_models.training.checkpoint import write_whole
from offramp_models.training.loop import Checkpoint, evaluate, train
from offramp_models.training.losses import weighted_loss
from offramp_models.training.methods import METHODS, Lesson, Method, create_method
from offramp_models.training.settings import Epoch, Step, TrainingRecord, TrainingSettings

__all__ = [
    "METHODS",
    "Checkpoint",
    "Epoch",
    "Lesson",
    "Method",
    "Step",
    "TrainingRecord",
    "TrainingSettings",
    "create_method",
    "evaluate",
    "train",
    "weighted_loss",
    "write_whole",
]
