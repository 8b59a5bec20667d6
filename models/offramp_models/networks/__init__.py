"""The architectures, one a file.

Each is built for images of a shape and a number of classes, with the exits of a name, and with knobs of its own; all
have defaults. `forward` returns the logits of every exit, in order: that is all the exporter needs to know.
"""

from offramp_models.networks.blockdrop import BlockDrop
from offramp_models.networks.convnet_aig import ConvNetAIG
from offramp_models.networks.create import NETWORKS, NetworkPlan, create_network, plan_network
from offramp_models.networks.ddi import DDI
from offramp_models.networks.gated_network import GatedNetwork
from offramp_models.networks.image_network import ImageNetwork
from offramp_models.networks.layerdrop import LayerDrop
from offramp_models.networks.msdnet import MSDNet
from offramp_models.networks.multi_exit_cnn import MultiExitCNN
from offramp_models.networks.resnet import ResNet
from offramp_models.networks.skipnet import SkipNet
from offramp_models.networks.stochastic_depth import StochasticDepth

__all__ = [
    "DDI",
    "NETWORKS",
    "BlockDrop",
    "ConvNetAIG",
    "GatedNetwork",
    "ImageNetwork",
    "LayerDrop",
    "MSDNet",
    "MultiExitCNN",
    "NetworkPlan",
    "ResNet",
    "SkipNet",
    "StochasticDepth",
    "create_network",
    "plan_network",
]
