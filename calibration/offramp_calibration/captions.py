"""What the report says in words; every number in it is read from the record."""

from collections.abc import Callable
from dataclasses import dataclass

from offramp_calibration.advice import Advice
from offramp_calibration.evaluate import ANY_POLICY, LABEL_ORACLE
from offramp_calibration.evaluation import Evaluation
from offramp_calibration.measured import ACCURACY_LOSSES, CurveSummary
from offramp_calibration.promises import PromiseResult


@dataclass(frozen=True, slots=True)
class Words:
    """What is written at a figure.

    Attributes:
        alt: For who cannot see it.
        caption: What to see in it.
    """

    alt: str
    caption: str


def percent(share: float | None, digits: int = 1) -> str:
    """Write a share as people read it; a dash for none."""
    return "–" if share is None else f"{100 * share:.{digits}f} %"


def headline(evaluation: Evaluation) -> str:
    """Say in one sentence what early exit buys here."""
    full = percent(evaluation.full.accuracy.value)
    point = evaluation.reference
    if evaluation.is_calibrated:
        return (
            f"At {percent(point.compute, 0)} of the compute, {percent(point.accuracy.value)} of the answers are right; "
            f"at full depth, {full}."
        )
    saving, swept = cost_within(evaluation, ACCURACY_LOSSES[1]), "confidence" if evaluation.gates is None else "gate"
    if saving is None:
        return f"At full depth, {full} of the answers are right."
    return (
        f"At full depth, {full} of the answers are right; a {swept} threshold comes within half a point of that at "
        f"{percent(saving, 0)} of the compute."
    )


def cost_within(evaluation: Evaluation, loss: float) -> float | None:
    """Give the least compute of any policy within an accuracy loss of full depth."""
    curve = _curve(evaluation, ANY_POLICY)
    return None if curve is None else curve.cost_at[ACCURACY_LOSSES.index(loss)]


def words_of(evaluation: Evaluation) -> dict[str, Words]:
    """Give the words of every figure that the report may have, by the figure's name."""
    writers: dict[str, Callable[[Evaluation], Words]] = {
        "trade-off": _trade_off,
        "budgets": _budgets,
        "policies": _policies,
        "reliability": _reliability,
        "overthinking": _overthinking,
        "gates": _gates,
    }
    return {name: write(evaluation) for name, write in writers.items()}


def advice_sentence(advice: Advice) -> str:
    """Say what the advice comes to."""
    if not advice.exits:
        return "There is one exit only; nothing can be merged."
    if advice.merge and advice.merged is not None:
        *others, last = (advice.exits[index].name for index in advice.merge)
        names = f"{', '.join(others)} and {last}" if others else last
        costs = "costs more than it saves" if len(advice.merge) == 1 else "cost more than they save"
        return (
            f"On this machine {names} {costs}: without, an average row takes "
            f"{advice.merged.ms:.3f} ms instead of {advice.now.ms:.3f} ms and "
            f"{percent(advice.merged.accuracy)} are right instead of "
            f"{percent(advice.now.accuracy)}."
        )
    if all(exit_.verdict == "unknown" for exit_ in advice.exits):
        return "What each exit's head may cost at most for the exit to pay is shown; what it does cost is not known."
    return "On this machine no exit costs more than it saves beyond what the measurement can tell."


def promise_words(promise: PromiseResult) -> str:
    """Say what was promised."""
    share = percent(promise.asked)
    statement = {
        "consistency": f"≤ {share} unlike full depth",
        "accuracy_loss": f"≤ {share} right answers lost",
        "accuracy": f"≥ {share} right",
    }[promise.kind]
    return f"{statement}, {'on average' if promise.delta is None else f'{percent(1 - promise.delta, 0)} sure'}"


def verdict(promise: PromiseResult) -> str:
    """Say what came of it; one data set cannot refute what is promised on average only."""
    if promise.held:
        return "held"
    if promise.delta is None:
        return "exceeded here"
    return "missed, within noise" if promise.within_noise else "missed"


def _trade_off(evaluation: Evaluation) -> Words:
    first, full = evaluation.static[0], evaluation.full
    oracle = evaluation.label_oracle
    saving = cost_within(evaluation, ACCURACY_LOSSES[2])
    tail = "" if saving is None else f" {percent(saving, 0)} of the compute loses at most one point of accuracy."
    if oracle is None:
        return Words(
            f"Accuracy over average compute, for settings of the gates, against {percent(full.accuracy.value)} at full "
            "depth.",
            f"The blue curve shows what shutting gates, and leaving early where exits are, costs and saves.{tail}",
        )
    alt = (
        f"Accuracy over average compute. Exits alone rise from {percent(first.accuracy.value)} at "
        f"{percent(first.compute, 0)} of the compute to {percent(full.accuracy.value)} at all of it; adaptive policies "
        f"lie above them; the label oracle reaches {percent(oracle.accuracy.value)} at {percent(oracle.compute, 0)}."
    )
    return Words(
        alt,
        "The further the blue curve lies above the grey squares, the more it pays to let each sample leave when it is "
        f"ready; the orange curve is what nobody can beat.{tail}",
    )


def _budgets(evaluation: Evaluation) -> Words:
    reached = [(result.asked, result.point) for result in evaluation.budgets if result.point is not None]
    took = ", ".join(f"{percent(asked, 0)} took {percent(point.compute, 0)}" for asked, point in reached)
    return Words(
        f"Compute asked for against compute taken: {took}; and, for each, the share of samples that left at each exit.",
        "Points on or below the dotted line keep their budget; far below it, more compute would not have bought more "
        "accuracy. With a larger budget samples leave later.",
    )


def _policies(evaluation: Evaluation) -> Words:
    best = max(
        (curve for curve in evaluation.compute.curves if curve.name not in (LABEL_ORACLE, ANY_POLICY)),
        key=lambda curve: curve.area or 0.0,
    )
    return Words(
        f"Accuracy over compute, one panel per policy. The largest area is that of {best.name}.",
        f"Each policy in blue before all others in grey: the curve furthest up and left is best, here {best.name} by "
        "the area below it.",
    )


def _reliability(evaluation: Evaluation) -> Words:
    before = [exit_.uncalibrated.ece for exit_ in evaluation.exits]
    after = [exit_.calibrated.ece for exit_ in evaluation.exits]
    return Words(
        f"How often each exit is right over how sure it is. The largest calibration error is {percent(max(before))} as "
        f"trained and {percent(max(after))} at the bundle's temperatures.",
        "On the dotted line an exit is as often right as it says; below it, it is too sure. Every dot stands for "
        "equally many samples.",
    )


def _overthinking(evaluation: Evaluation) -> Words:
    thinking = evaluation.overthinking
    return Words(
        f"Share of samples by the exit that is first right: {percent(thinking.lasting[0] + thinking.lost[0])} at the "
        f"first, {percent(thinking.never_right)} never.",
        f"{percent(thinking.wasteful)} of the samples are right at the end and were right before: what they ran on was "
        f"wasted. The hatched {percent(thinking.destructive)} were right once and are wrong at the end.",
    )


def _gates(evaluation: Evaluation) -> Words:
    rungs = () if evaluation.gates is None else evaluation.gates.rungs
    if not rungs:
        return Words("", "")
    least = rungs[-1].point
    own = next(rung for rung in rungs if rung.threshold is None)
    rates = own.open_rates
    return Words(
        f"Accuracy over average compute, one point per gate threshold, from {percent(rungs[0].point.compute, 0)} to "
        f"{percent(least.compute, 0)} of the compute; and how often each gate is open at each threshold.",
        f"The higher the gate threshold, the further left. At the network's own thresholds "
        f"{percent(own.point.compute, 0)} of full depth's FLOPs run and {percent(own.point.accuracy.value)} are right; "
        f"its gates are open for {percent(min(rates), 0)} to {percent(max(rates), 0)} of the samples.",
    )


def _curve(evaluation: Evaluation, name: str) -> CurveSummary | None:
    return next((curve for curve in evaluation.compute.curves if curve.name == name), None)
