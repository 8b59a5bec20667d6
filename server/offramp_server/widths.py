"""How broadly stages run on a device whose threads dispatches share out: one after another, or several side by side.

A dispatch with every thread answers a lone row soonest. While many rows wait, dispatches with a part of the threads
each do more in all: no operator ends with threads that wait for its slowest, and while the rows of one are routed and
answered the others run. How much more is the machine's and the network's affair, so both are measured when a model is
loaded, and a model for which it does not pay always runs with every thread.
"""

from dataclasses import dataclass
from typing import Final

from offramp_server.profile import Profile

MOST_ABREAST: Final = 8
"""Dispatches that share a device's threads out, at most: deciding about their rows is one thread's work at a time."""
SHORT_BUDGET: Final = 4.0
"""Budgets under so many times what a row takes with a part of the threads leave no time for that."""


@dataclass(frozen=True, slots=True, eq=False)
class Width:
    """A way to run a model's dispatches.

    Attributes:
        profile: How long its stages take so.
        num_threads: Threads that one dispatch takes of those that are shared out; 0 where every runner has its own.
        num_abreast: How many dispatches run side by side.
    """

    profile: Profile
    num_threads: int = 0
    num_abreast: int = 1

    @property
    def short_budget_s(self) -> float:
        """A row that has less time than this is better run with more threads, if there are any."""
        return SHORT_BUDGET * self.profile.alone_s
