"""How long does a sweep take to replay?

    python calibration/benchmarks/replay_speed.py

Replays 100 confidence thresholds over 50,000 samples of 5 exits, on one core, and tells the best of five times.
"""

import time
from typing import Annotated

import numpy as np
import typer
from offramp_calibration import Outcomes, replay
from offramp_calibration.sweep import confidence_thresholds
from offramp_contract.policy_spec import ConfidenceSpec
from offramp_contract.statistics import Decision


def main(
    samples: Annotated[int, typer.Option(min=1)] = 50_000,
    exits: Annotated[int, typer.Option(min=2)] = 5,
    points: Annotated[int, typer.Option(min=3)] = 100,
) -> None:
    """Time it."""
    outcomes = drawn(samples, exits)
    specs = [ConfidenceSpec(threshold=threshold) for threshold in confidence_thresholds(outcomes, points)]
    seconds = []
    for _ in range(5):
        start = time.process_time()
        for spec in specs:
            replay(spec, outcomes)
        seconds.append(time.process_time() - start)
    typer.echo(f"{len(specs)} points over {samples:,} samples of {exits} exits: {min(seconds):.2f} s of one core")


def drawn(num_samples: int, num_exits: int) -> Outcomes:
    """Draw scores as wide as those of a trained network; of what exits decide, a replay reads no more."""
    rng = np.random.default_rng(0)
    packed_END = rng.normal(3.0, 4.0, size=(num_exits, num_samples, 13)).astype(np.float32)
    class_NE = rng.integers(10, size=(num_samples, num_exits), dtype=np.int32)
    depth_E = np.arange(1, num_exits + 1) / num_exits
    return Outcomes(rng.integers(10, size=num_samples), tuple(map(Decision, packed_END)), class_NE, depth_E)


if __name__ == "__main__":
    typer.run(main)
