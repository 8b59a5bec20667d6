"""What the demo asks a server for, and what came of it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

THRESHOLDS = (0.5, 0.7, 0.8, 0.9, 0.95, 0.99, 0.999)


@dataclass(frozen=True, slots=True)
class Asked:
    """One way to ask.

    Attributes:
        policy: What a person calls it.
        short: The same in a word, for a figure.
        query: Query parameters of the request.
        budget_ms: Its latency budget, if it has one.
    """

    policy: str
    short: str
    query: tuple[tuple[str, str], ...]
    budget_ms: float | None = None

    def within(self, budget_ms: float) -> "Asked":
        """Ask the same, with a latency budget."""
        query = (*self.query, ("latency_ms", f"{budget_ms:g}"))
        return Asked(self.policy, self.short, query, budget_ms)


@dataclass(frozen=True, slots=True)
class Measured:
    """What came of asking for every test image once, one a request.

    Attributes:
        asked: How it was asked.
        num_answered: Requests that were answered.
        num_failed: Requests that were not.
        accuracy: Share of right answers among those answered.
        mean_depth: Share of the full path's FLOPs that an answer took on average.
        p50_ms: Median latency, counted from when a request was due.
        p99_ms: The same for the 99th percentile.
        forced: Share of answers that the deadline forced.
        exit_counts_E: Answers by exit.
    """

    asked: Asked
    num_answered: int
    num_failed: int
    accuracy: float
    mean_depth: float
    p50_ms: float
    p99_ms: float
    forced: float
    exit_counts_E: tuple[int, ...]


def at_exit(index: int, num_exits: int) -> Asked:
    """Ask for the same exit for everyone."""
    names = {0: "first exit only", num_exits - 1: "full depth"}
    query = (("policy", json.dumps({"kind": "fixed", "exit": index})),)
    return Asked(names.get(index, f"exit_{index} only"), f"exit_{index}", query)


def confidence(threshold: float) -> Asked:
    """Ask to leave where the largest probability reaches a threshold."""
    query = (("policy", "confidence"), ("threshold", f"{threshold:g}"))
    return Asked(f"confidence ≥ {threshold:g}", f"{threshold:g}", query)


def entropy(threshold: float) -> Asked:
    """Ask to leave where the normalised entropy is down to a threshold."""
    query = (("policy", "entropy"), ("threshold", f"{threshold:g}"))
    return Asked(f"entropy ≤ {threshold:g}", f"{threshold:g}", query)


def patience(exits: int) -> Asked:
    """Ask to leave where the label has stayed the same for so many exits."""
    return Asked(f"patience {exits}", f"{exits}", (("policy", "patience"), ("patience", str(exits))))


def compute(share: float) -> Asked:
    """Ask for the best answers that an average share of full depth's compute can give."""
    return Asked(f"compute ≤ {share:g}", f"{share:g}", (("compute", f"{share:g}"),))


def bars(counts: Sequence[int]) -> str:
    """Draw a histogram, a block character per bin and the percentages: `▂▃▁▁ 30/43/18/9`."""
    total = sum(counts) or 1
    blocks = "·▁▂▃▄▅▆▇█"
    heights = [max(1, round(8 * count / total)) if count else 0 for count in counts]
    shares = "/".join(f"{100 * count / total:.0f}" for count in counts)
    return "".join(blocks[height] for height in heights) + " " + shares
