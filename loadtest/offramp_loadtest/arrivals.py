"""When requests are due. Arrivals depend on nothing but the plan: an open loop never waits for an answer."""

from collections.abc import Iterator
from itertools import count
from typing import Literal

import numpy as np

ArrivalKind = Literal["poisson", "fixed"]


def due_times_s(kind: ArrivalKind, rate: float, seconds: float, seed: int) -> Iterator[float]:
    """Give the due time of each request, in seconds from the start, rising.

    Args:
        kind: `poisson` draws independent exponential gaps; `fixed` spaces requests evenly.
        rate: Requests per second, on average.
        seconds: No request is due at or after this time.
        seed: Of the gaps; the same seed gives the same times.
    """
    rng = np.random.default_rng(seed)
    due_s = 0.0
    for number in count(1):
        due_s = due_s + rng.exponential(1.0 / rate) if kind == "poisson" else number / rate
        if due_s >= seconds:
            return
        yield due_s
