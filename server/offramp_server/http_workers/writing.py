"""Writes what the server's parts pass to each other as messages, and reads it back: every field, and exactly.

A policy travels as it is written down and is compiled where it runs, once for all rows that ask alike.

Shapes: C = classes, K = leading classes.
"""

from functools import lru_cache
from typing import Any, Final

import numpy as np
import orjson
from offramp_contract import errors
from offramp_contract.errors import OfframpError, Overloaded, RequestError
from offramp_contract.manifest import Manifest
from offramp_contract.native import NativeRules
from offramp_contract.policy import Policy, Reason
from offramp_contract.policy_spec import PolicySpec, compile_policy, parse_policy
from offramp_contract.statistics import FloatArray

from offramp_server.http_workers.messages import (
    Event,
    Floats,
    WrittenError,
    WrittenExit,
    WrittenOptions,
    WrittenProgress,
    WrittenResult,
    WrittenRow,
)
from offramp_server.messages import ExitAnswer, GateSeen, Progress, RequestOptions, Result, RowAnswer


def written_options(options: RequestOptions) -> WrittenOptions:
    """Write a request's options."""
    return WrittenOptions(
        _written_policy(options.policy_spec),
        options.operating_point,
        options.latency_ms,
        options.min_exit,
        options.max_exit,
        options.gate_thresholds,
        options.combine,
        options.on_miss,
        options.explain,
        options.wants_progress,
        options.wants_logits,
        options.is_free,
    )


def options_of(written: WrittenOptions, manifest: Manifest) -> RequestOptions:
    """Read a request's options, for one model.

    Raises:
        InvalidValue: If the policy is not one that the model can follow.
    """
    spec, policy = _policy(written.policy, len(manifest.exits), manifest.native)
    return RequestOptions(
        policy=policy,
        policy_spec=spec,
        operating_point=written.operating_point,
        latency_ms=written.latency_ms,
        min_exit=written.min_exit,
        max_exit=written.max_exit,
        gate_thresholds=written.gate_thresholds,
        combine=written.combine,
        on_miss=written.on_miss,
        explain=written.explain,
        wants_progress=written.wants_progress,
        wants_logits=written.wants_logits,
        is_free=written.is_free,
    )


def written_event(request: int, event: Progress | Result) -> Event:
    """Write what the engine tells of a request."""
    if isinstance(event, Progress):
        return WrittenProgress(request, event.row, _written_exit(event.answer), event.depth)
    rows = tuple([None if isinstance(row, OfframpError) else _written_row(row) for row in event.rows])
    failures = tuple([written_error(row) for row in event.rows if isinstance(row, OfframpError)])
    return WrittenResult(
        request, rows, failures, event.queue_s, event.compute_s, event.total_s, event.budget_ms, event.gear
    )


def event_of(written: Event) -> Progress | Result:
    """Read what the engine tells of a request."""
    if isinstance(written, WrittenProgress):
        return Progress(written.row, _exit(written.answer), written.depth)
    failures = iter(written.errors)
    return Result(
        rows=tuple([error_of(next(failures)) if row is None else _row(row) for row in written.rows]),
        queue_s=written.queue_s,
        compute_s=written.compute_s,
        total_s=written.total_s,
        budget_ms=written.budget_ms,
        gear=written.gear,
    )


def written_error(error: OfframpError) -> WrittenError:
    """Write an error."""
    field = error.field if isinstance(error, RequestError) else None
    return WrittenError(error.code, error.message, field, error.retry_after_s if isinstance(error, Overloaded) else 0.0)


def error_of(written: WrittenError) -> OfframpError:
    """Read an error; one of a kind that is not known here is of the tree's root."""
    kind = _ERRORS.get(written.code, OfframpError)
    if issubclass(kind, Overloaded):
        return kind(written.message, written.retry_after_s)
    if issubclass(kind, RequestError):
        return kind(written.message, written.field)
    return kind(written.message)


_ERRORS: Final[dict[str, type[OfframpError]]] = {
    kind.code: kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, OfframpError)
}


@lru_cache(maxsize=1024)
def _written_policy(spec: PolicySpec) -> bytes:
    return spec.model_dump_json().encode()


@lru_cache(maxsize=1024)
def _policy(written: bytes, num_exits: int, native: NativeRules | None) -> tuple[PolicySpec, Policy]:
    spec = parse_policy(orjson.loads(written))
    return spec, compile_policy(spec, num_exits, native)


def _written_exit(answer: ExitAnswer) -> WrittenExit:
    return WrittenExit(
        int(answer.exit_index),
        np.asarray(answer.top_class_K, np.int32).tobytes(),
        _written_floats(answer.top_probability_K),
        float(answer.log_odds),
        float(answer.entropy),
        float(answer.margin),
        None if answer.native is None else float(answer.native),
        None if answer.logits_C is None else _written_floats(answer.logits_C),
    )


def _exit(written: WrittenExit) -> ExitAnswer:
    return ExitAnswer(
        written.exit_index,
        np.frombuffer(written.top_class, np.int32),
        _floats(written.top_probability),
        written.log_odds,
        written.entropy,
        written.margin,
        written.native,
        None if written.logits is None else _floats(written.logits),
    )


def _written_row(row: RowAnswer) -> WrittenRow:
    return WrittenRow(
        _written_exit(row.answer),
        int(row.reason),
        row.depth,
        row.stages,
        float(row.score),
        row.threshold,
        tuple([_written_exit(answer) for answer in row.seen]),
        row.gate_decisions,
        tuple([(gate.score, gate.threshold, gate.decision) for gate in row.gates_seen]),
    )


def _row(written: WrittenRow) -> RowAnswer:
    return RowAnswer(
        answer=_exit(written.answer),
        reason=Reason(written.reason),
        depth=written.depth,
        stages=written.stages,
        score=written.score,
        threshold=written.threshold,
        seen=tuple([_exit(answer) for answer in written.seen]),
        gate_decisions=written.gate_decisions,
        gates_seen=tuple([GateSeen(*gate) for gate in written.gates_seen]),
    )


def _written_floats(array: FloatArray) -> Floats:
    name: Any = array.dtype.str
    return name, array.tobytes()


def _floats(written: Floats) -> FloatArray:
    name, values = written
    return np.frombuffer(values, name)
