"""Output modules: what stands at the end of a stage and says what the network thinks so far."""

from offramp_models.exits.pooled_linear import PooledLinear

__all__ = ["PooledLinear"]
