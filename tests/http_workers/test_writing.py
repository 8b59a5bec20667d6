"""What is written and read back is what it was, field by field."""

import dataclasses
from typing import get_args

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from offramp_contract import errors
from offramp_contract.errors import OfframpError
from offramp_contract.policy import Reason
from offramp_contract.policy_spec import AllOfSpec, ConfidenceSpec, PatienceSpec, compile_policy
from offramp_runtime import open_bundle
from offramp_server.http_workers.messages import Cancel, Submit, decode_for_engine, decode_for_worker, encode
from offramp_server.http_workers.writing import (
    error_of,
    event_of,
    options_of,
    written_error,
    written_event,
    written_options,
)
from offramp_server.messages import (
    ExitAnswer,
    GateDecision,
    GateSeen,
    Progress,
    RequestOptions,
    Result,
    RowAnswer,
)

NUMBERS = st.floats(allow_nan=False)
SHARES = st.floats(0, 1)
INDICES = st.integers(0, 2**31 - 1)
MAYBE = st.none()
DECISIONS = st.none() | st.sampled_from(get_args(GateDecision))
DTYPES = st.sampled_from([np.float32, np.float64])


def arrays(dtypes, values=NUMBERS, max_size=6):
    return st.builds(
        lambda dtype, drawn: np.array(drawn).astype(dtype), dtypes, st.lists(values, min_size=1, max_size=max_size)
    )


FLOATS = arrays(DTYPES, st.floats(-1e30, 1e30))
EXITS = st.builds(
    ExitAnswer,
    exit_index=st.integers(0, 1023),
    top_class_K=arrays(st.just(np.int32), st.integers(0, 2**31 - 1)),
    top_probability_K=FLOATS,
    log_odds=NUMBERS,
    entropy=SHARES,
    margin=SHARES,
    native=MAYBE | NUMBERS,
    logits_C=MAYBE | FLOATS,
)
ROWS = st.builds(
    RowAnswer,
    answer=EXITS,
    reason=st.sampled_from(Reason),
    depth=SHARES,
    stages=st.lists(INDICES, max_size=4).map(tuple),
    score=NUMBERS,
    threshold=MAYBE | NUMBERS,
    seen=st.lists(EXITS, max_size=2).map(tuple),
    gate_decisions=st.lists(DECISIONS, max_size=3).map(tuple),
    gates_seen=st.lists(st.builds(GateSeen, MAYBE | NUMBERS, NUMBERS, DECISIONS), max_size=2).map(tuple),
)
KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, OfframpError)]


@st.composite
def failures(draw):
    kind, message = draw(st.sampled_from(KINDS)), draw(st.text(max_size=20))
    if issubclass(kind, errors.Overloaded):
        return kind(message, draw(st.floats(0, 60)))
    if issubclass(kind, errors.RequestError):
        return kind(message, draw(MAYBE | st.text(max_size=5)))
    return kind(message)


RESULTS = st.builds(
    Result,
    rows=st.lists(ROWS | failures(), min_size=1, max_size=3).map(tuple),
    queue_s=SHARES,
    compute_s=SHARES,
    total_s=SHARES,
    budget_ms=MAYBE | NUMBERS,
    gear=MAYBE | st.integers(0, 7),
)
EVENTS = RESULTS | st.builds(Progress, row=INDICES, answer=EXITS, depth=SHARES)
OPTIONS = {
    "operating_point": MAYBE | st.text(max_size=5),
    "latency_ms": MAYBE | st.floats(1, 1e6),
    "min_exit": st.integers(0, 2),
    "max_exit": MAYBE | st.integers(0, 2),
    "gate_thresholds": MAYBE | st.lists(SHARES, max_size=3).map(tuple),
    "combine": st.sampled_from(["last", "mean", "geometric"]),
    "on_miss": st.sampled_from(["answer", "reject"]),
    **dict.fromkeys(["explain", "wants_progress", "wants_logits", "is_free"], st.booleans()),
}
POLICIES = st.sampled_from([ConfidenceSpec(threshold=0.3), PatienceSpec(patience=2)]) | st.floats(0, 1).map(
    lambda threshold: AllOfSpec(of=(ConfidenceSpec(threshold=(threshold, 1.0)), PatienceSpec(patience=1)))
)


def plain(value):
    """Turn a message into what `==` compares, types and all."""
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.tolist()
    if isinstance(value, OfframpError):
        return type(value), vars(value)
    return (type(value), [plain(one) for one in value]) if isinstance(value, tuple) else value


def there_and_back(event):
    decoded = decode_for_worker(encode(written_event(7, event)))
    assert decoded.request == 7
    return event_of(decoded)


@given(EVENTS)
def test_what_the_engine_tells_arrives_as_it_was(event):
    assert plain(there_and_back(event)) == plain(event)


@given(POLICIES, st.fixed_dictionaries(OPTIONS))
def test_what_a_request_asks_for_arrives_as_it_was(toy_manifest, spec, fields):
    named = {field.name for field in dataclasses.fields(RequestOptions)}
    assert named == {"policy", "policy_spec", *fields}, "a new field needs a place in WrittenOptions and here"
    options = RequestOptions(compile_policy(spec, 3), spec, **fields)
    message = encode(Submit(1, 2, 64, 3, 4.5, written_options(options)))
    assert options_of(decode_for_engine(message).options, toy_manifest) == options


@pytest.fixture(scope="session")
def toy_manifest(toy_bundle):
    return open_bundle(toy_bundle).manifest


@given(failures())
def test_an_error_keeps_its_kind_its_sentence_and_what_belongs_to_it(error):
    assert plain(error_of(written_error(error))) == plain(error)


def test_an_error_of_a_kind_that_is_not_known_is_an_internal_one():
    class New(OfframpError):
        code = "from_the_future"

    assert plain(error_of(written_error(New("a sentence")))) == plain(OfframpError("a sentence"))


@given(st.binary(max_size=100))
def test_bytes_that_are_no_message_are_refused(garbage):
    for decode in (decode_for_engine, decode_for_worker):
        try:
            decode(garbage)
        except msgspec.DecodeError:
            continue


def test_a_worker_cannot_be_spoken_to_in_the_engines_words():
    with pytest.raises(msgspec.ValidationError):
        decode_for_worker(encode(Cancel(1)))
