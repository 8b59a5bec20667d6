"""The architectures, one a file.

Each is built for images of a shape and a number of classes, with the exits of a name, and with knobs of its own; all
have defaults. `forward` returns the logits of every exit, in order: that is all the exporter needs to know.
"""

from offramp_models.networks.create import NETWORKS, NetworkPlan, create_network, plan_network
from offramp_models.networks.image_network import ImageNetwork
from offramp_models.networks.msdnet import MSDNet
from offramp_models.networks.multi_exit_cnn import MultiExitCNN
from offramp_models.networks.resnet import ResNet

__all__ = [
    "NETWORKS",
    "ImageNetwork",
    "MSDNet",
    "MultiExitCNN",
    "NetworkPlan",
    "ResNet",
    "create_network",
    "plan_network",
]
