"""How a multi-exit network learns: the joint loss, one loop, and the accuracy of every exit."""

from offramp_models.training.loop import Step, TrainingRecord, TrainingSettings, evaluate, train
from offramp_models.training.losses import weighted_loss

__all__ = ["Step", "TrainingRecord", "TrainingSettings", "evaluate", "train", "weighted_loss"]
