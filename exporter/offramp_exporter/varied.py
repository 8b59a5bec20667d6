"""The proof past the example: on inputs varied until every exit has been taken, as far as the effort reaches."""

from collections.abc import Callable

from offramp_contract.manifest import Proof
from offramp_runtime import StageExecutor

from offramp_exporter.batch_range import Reference
from offramp_exporter.coverage import Effort, cover
from offramp_exporter.early_returns.native_proof import Own, goal_of, prove_native
from offramp_exporter.examples import Examples
from offramp_exporter.rounding import rounding_of
from offramp_exporter.verify import prove_covered


def prove_varied(
    executor: StageExecutor,
    reference: Reference,
    examples: Examples,
    *,
    batch: int,
    report: Callable[[str], None],
    given: Examples | None = None,
    own: Own | None = None,
    effort: Effort | None = None,
) -> Proof:
    """Vary the inputs and prove the bundle on all of them.

    Args:
        executor: The bundle, loaded.
        reference: The network that returns all exits.
        examples: Inputs that the network takes.
        batch: How many rows to run at a time.
        report: Told in a sentence what is tried.
        given: Real data, if there is any.
        own: The network as it was written, where it returns early by itself.
        effort: How long to look for inputs.

    Returns:
        What was tried and what was not reached, for the manifest.

    Raises:
        ParityError: If the bundle differs from the network on any input, exit taken included.
    """
    coverage = cover(examples, None if own is None else goal_of(own), given=given, effort=effort)
    rounding = rounding_of(executor.manifest)
    source = "the example" if given is None else "the example and the data"
    report(f"proving parity on {coverage.num_tried} inputs varied from {source}")
    num_flips = prove_covered(executor, reference, coverage.inputs, batch)
    if num_flips:
        report(f"{num_flips} of them lie at a threshold inside the network, where rounding changes its own answer")
    if own is not None:
        report("proving on each of them that the native policy leaves where the network itself returns")
        num_flips = prove_native(executor, own, coverage.inputs, rounding.tolerance)
        if num_flips:
            report(f"{num_flips} of them lie within {rounding.near:g} of an exit's threshold, where rounding decides")
    return Proof(num_inputs=coverage.num_tried, unreached=coverage.unreached, tolerance=rounding.tolerance)
