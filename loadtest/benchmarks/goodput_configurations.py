"""What is compared under load: how each server is started, and what its clients ask for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from offramp_contract.calibration import OperatingPoint
from offramp_runtime import Bundle

Kind: TypeAlias = Literal["static", "early", "ablation", "bound"]

FULL_DEPTH = "full depth"
EARLY_EXIT = "early exit, everything on"
ORACLE = "label oracle"
BATCH_TIMEOUT_MS = 5
FLOOR_BELOW_BEST = 0.05
LOSS_OF_THE_DEFAULT = 0.005


@dataclass(frozen=True, slots=True)
class Configuration:
    """One curve of the figure; it has a server process of its own.

    Attributes:
        name: What the report calls it.
        kind: `static` is what servers without early exits do, `early` is ours, an `ablation` is ours less one thing,
            a `bound` knows what nobody can know.
        flags: Of `offramp serve`.
        fields: What every request says.
        has_budget: Whether requests tell the server their latency budget; a static server knows none.
        asks_by_row: Whether each request asks for what the oracle knows about its row.
    """

    name: str
    kind: Kind
    flags: tuple[str, ...] = ()
    fields: Mapping[str, Any] = field(default_factory=dict)
    has_budget: bool = True
    asks_by_row: bool = False


@dataclass(frozen=True, slots=True)
class Operation:
    """What an operator has decided about a bundle.

    Attributes:
        point: The operating point that serves requests while there is no backlog.
        floor: The accuracy that every gear is certified for.
        full_accuracy: What calibration expects of full depth.
    """

    point: OperatingPoint
    floor: float
    full_accuracy: float


def full_depth_fields(bundle: Bundle) -> dict[str, Any]:
    """Give what a request says that wants the whole network."""
    last = {"policy": {"kind": "fixed", "exit": len(bundle.manifest.exits) - 1}}
    return {"gates": "open", **last} if bundle.manifest.gates else last


def decide(bundle: Bundle, point: str | None, floor: float | None) -> Operation:
    """Take an operator's decisions, or the usual ones.

    Args:
        bundle: With a calibration.
        point: Name of an operating point; None takes the cheapest that is expected to lose at most half a point.
        floor: Least certified accuracy of a gear; None is five points below the best that is certified.

    Raises:
        SystemExit: If the bundle is not calibrated or knows no such point.
    """
    points = bundle.calibration.operating_points
    bounds = [kept.bound for kept in (point.certificate("accuracy", 0.05) for point in points) if kept is not None]
    if not bounds:
        raise SystemExit(f"{bundle.manifest.name}: needs operating points that are certified; run `offramp calibrate`")
    full_accuracy = max(points, key=lambda p: p.compute).accuracy
    if point is None:
        enough = [p for p in points if p.accuracy >= full_accuracy - LOSS_OF_THE_DEFAULT]
        chosen = min(enough, key=lambda p: p.compute)
    else:
        named = {p.name: p for p in points}
        if point not in named:
            raise SystemExit(f"--point: {bundle.manifest.name} has no operating point {point!r}")
        chosen = named[point]
    return Operation(chosen, round(max(bounds) - FLOOR_BELOW_BEST, 3) if floor is None else floor, full_accuracy)


def configurations_of(bundle: Bundle, operation: Operation) -> list[Configuration]:
    """Give everything that is compared for a bundle."""
    full = full_depth_fields(bundle)
    ours = (
        "--default-operating-point", operation.point.name,
        "--gear-floor-accuracy", str(operation.floor),
    )  # fmt: skip
    static = _gated_statics() if bundle.manifest.gates else _exit_statics(len(bundle.manifest.exits))
    return [
        Configuration(FULL_DEPTH, "static", ("--no-forced-exits",), full, has_budget=False),
        *static,
        Configuration(EARLY_EXIT, "early", ours),
        Configuration("early exit, no batch re-forming", "ablation", (*ours, "--no-rebatch")),
        Configuration("early exit, no hold rule", "ablation", (*ours, "--no-hold")),
        Configuration(
            f"early exit, batches wait {BATCH_TIMEOUT_MS} ms",
            "ablation",
            (*ours, "--batch-timeout-ms", str(BATCH_TIMEOUT_MS)),
        ),
        Configuration("early exit, no gears", "ablation", (*ours, "--no-gears")),
        Configuration("early exit, no forced exits", "ablation", (*ours, "--no-forced-exits")),
        Configuration("deepest exit that fits", "early", (), full),
        Configuration(ORACLE, "bound", (), asks_by_row=True),
    ]


def _exit_statics(num_exits: int) -> list[Configuration]:
    return [
        Configuration(
            f"exit {index} for all",
            "static",
            ("--no-forced-exits",),
            {"policy": {"kind": "fixed", "exit": index}},
            has_budget=False,
        )
        for index in range(num_exits - 1)
    ]


def _gated_statics() -> list[Configuration]:
    return [
        Configuration(f"{name}", "static", ("--no-forced-exits",), {"gates": asked}, has_budget=False)
        for name, asked in (("the network's own gates", "own"), ("gates shut for all", "shut"))
    ]


def only(configurations: Sequence[Configuration], names: Sequence[str]) -> list[Configuration]:
    """Give those whose names contain one of these; all if there are none.

    Raises:
        SystemExit: If none does.
    """
    if not names:
        return list(configurations)
    chosen = [one for one in configurations if any(name in one.name for name in names)]
    if not chosen:
        raise SystemExit(f"--only: none of {', '.join(one.name for one in configurations)}")
    return chosen
