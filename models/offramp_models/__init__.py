"""The depth-adaptive networks, their exits, the data sets they learn from and how they are trained.

Data sets need no torch, so that a bundle can be calibrated on one where it serves; `networks`, `exits` and
`training` do.
"""

from offramp_models.data import DATA_SETS, load_data

__all__ = ["DATA_SETS", "load_data"]
