"""How a depth-adaptive network learns: methods, one loop, its checkpoints, accuracy at exits and the use of gates."""

from offramp_models.training.checkpoint import write_whole
from offramp_models.training.evaluation import Evaluation, evaluate, measure
from offramp_models.training.loop import Checkpoint, train
from offramp_models.training.losses import weighted_loss
from offramp_models.training.method import GatedLesson, Lesson, Method
from offramp_models.training.methods import METHODS, create_method
from offramp_models.training.settings import Epoch, GateUse, Step, TrainingRecord, TrainingSettings

__all__ = [
    "METHODS",
    "Checkpoint",
    "Epoch",
    "Evaluation",
    "GateUse",
    "GatedLesson",
    "Lesson",
    "Method",
    "Step",
    "TrainingRecord",
    "TrainingSettings",
    "create_method",
    "evaluate",
    "measure",
    "train",
    "weighted_loss",
    "write_whole",
]
