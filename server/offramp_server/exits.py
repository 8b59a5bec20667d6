"""What exits say about rows: unpacked from a stage's statistics, and combined where a request asks for that.

Shapes: B = rows, C = classes, D = width of a decision, K = exits seen.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import repeat

import numpy as np
from offramp_contract.statistics import Decision, FloatArray, decision_of_logits, log_softmax

from offramp_server.messages import Combine, ExitAnswer


@dataclass(slots=True, eq=False)
class Sighting:
    """What one exit says about a batch, still packed: most rows go on, and nobody asks what was said about them.

    Attributes:
        exit_index: The exit.
        decision_BD: Its packed statistics.
        logits_BC: Its raw scores, where a row needs them.
    """

    exit_index: int
    decision_BD: FloatArray
    logits_BC: FloatArray | None

    def answers(self, places: Sequence[int], needs_logits: Sequence[bool]) -> list[ExitAnswer]:
        """Unpack what is said about the rows at some places, with their raw scores where they need them."""
        logits_BC = self.logits_BC
        kept = (
            None
            if logits_BC is None
            else [logits_BC[place] if needed else None for place, needed in zip(places, needs_logits, strict=True)]
        )
        return exit_answers(self.exit_index, self.decision_BD[places], kept)


def exit_answers(
    exit_index: int, decision_BD: FloatArray, logits_BC: Iterable[FloatArray | None] | None = None
) -> list[ExitAnswer]:
    """Unpack a batch's decision tensor into what the exit says about each row.

    Args:
        exit_index: The exit.
        decision_BD: Its packed statistics.
        logits_BC: For each row its raw scores, or None where nobody needs them; None keeps none.
    """
    decision = Decision(decision_BD)
    columns = zip(
        decision.top_class_BK,
        decision.top_probability_BK,
        decision.log_odds_B.tolist(),
        decision.entropy_B.tolist(),
        decision.margin_B.tolist(),
        repeat(None) if decision.native_B is None else decision.native_B.tolist(),
        repeat(None) if logits_BC is None else logits_BC,
        strict=False,  # `repeat` has no end
    )
    return [ExitAnswer(exit_index, *column) for column in columns]


def combined_answer(seen: Sequence[ExitAnswer], combine: Combine, temperature: Callable[[int], float]) -> ExitAnswer:
    """Give a row's answer: the last exit's, or all exits' combined.

    Args:
        seen: What the exits so far have said, in order; with their logits unless `combine` is `last`.
        combine: How.
        temperature: Gives an exit's calibrated temperature.
    """
    last = seen[-1]
    if combine == "last" or len(seen) == 1:
        return last
    log_p_KC = np.stack(
        [log_softmax(said.logits_C / temperature(said.exit_index)) for said in seen if said.logits_C is not None]
    )
    combined_BC = _combine(log_p_KC, combine)[None]
    return exit_answers(last.exit_index, decision_of_logits(combined_BC), combined_BC.astype(np.float32))[0]


def _combine(log_p_KC: FloatArray, combine: Combine) -> FloatArray:
    """Combine exits' log-probabilities: their mean (survey eq. 4 with equal weights) or the log of the mean (eq. 3)."""
    if combine == "geometric":
        mean_C: FloatArray = log_p_KC.mean(axis=0)
        return mean_C
    log_mean_C: FloatArray = np.logaddexp.reduce(log_p_KC, axis=0) - np.log(len(log_p_KC))
    return log_mean_C
