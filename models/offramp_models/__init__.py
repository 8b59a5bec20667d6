"""The depth-adaptive networks, their exits, the data sets they learn from and how they are trained."""

from offramp_models.data import DATA_SETS, load_data
from offramp_models.networks import NETWORKS, create_network

__all__ = ["DATA_SETS", "NETWORKS", "create_network", "load_data"]
