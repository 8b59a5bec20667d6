"""What rows have seen at the exits they passed: remembered packed for all of them, unpacked for those who leave."""

from collections.abc import Sequence

from offramp_contract.statistics import Decision

from offramp_server.exits import Sighting
from offramp_server.messages import ExitAnswer
from offramp_server.submission import Sample


def look(sighting: Sighting, samples: Sequence[Sample]) -> None:
    """Let each row remember what an exit says about it, in the order of the rows there."""
    for place, sample in enumerate(samples):
        sample.sighting, sample.place = sighting, place
    collecting = [sample for sample in samples if sample.keeps_all]
    if collecting:
        for sample, answer in zip(collecting, last_answers(collecting), strict=True):
            sample.seen.append(answer)
    comparing = [sample for sample in samples if sample.policy.compares_labels]
    if comparing:
        classes = Decision(sighting.decision_BD).class_B.tolist()
        for sample in comparing:
            sample.classes.append(classes[sample.place])


def last_answers(samples: Sequence[Sample]) -> list[ExitAnswer]:
    """Unpack what the last exit that each row has seen says about it."""
    sightings = {sample.sighting for sample in samples}
    if len(sightings) > 1:
        return [answer for sample in samples for answer in last_answers([sample])]
    (sighting,) = sightings
    if sighting is None:
        raise RuntimeError("a row that has seen no exit has no answer: this is a bug")
    return sighting.answers([sample.place for sample in samples], [sample.needs_logits for sample in samples])
