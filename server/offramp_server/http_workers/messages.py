"""What travels between a worker and the engine: MessagePack arrays with a schema, no code in them.

`writing` makes these of what the server's parts pass to each other, and the other way round.
"""

from typing import Final, Literal, TypeAlias

import msgspec

from offramp_server.messages import Combine, GateDecision, OnMiss

Floats: TypeAlias = tuple[Literal["<f2", "<f4", "<f8"], bytes]
"""An array of floats: numpy's name of their type, and their bytes."""


class _Message(msgspec.Struct, array_like=True, gc=False):
    """A message; its kind is its first element."""


class WrittenError(_Message):
    """An error of the contract's tree."""

    code: str
    message: str
    field: str | None = None
    retry_after_s: float = 0.0


class WrittenOptions(_Message):
    """`RequestOptions`; the policy as JSON."""

    policy: bytes
    operating_point: str | None
    latency_ms: float | None
    min_exit: int
    max_exit: int | None
    gate_thresholds: tuple[float, ...] | None
    combine: Combine
    on_miss: OnMiss
    explain: bool
    wants_progress: bool
    wants_logits: bool
    is_free: bool


class WrittenExit(_Message):
    """`ExitAnswer`; classes as the bytes of an int32 array."""

    exit_index: int
    top_class: bytes
    top_probability: Floats
    log_odds: float
    entropy: float
    margin: float
    native: float | None
    logits: Floats | None


class WrittenRow(_Message):
    """`RowAnswer`."""

    answer: WrittenExit
    reason: int
    depth: float
    stages: tuple[int, ...]
    score: float
    threshold: float | None
    seen: tuple[WrittenExit, ...]
    gate_decisions: tuple[GateDecision | None, ...]
    gates_seen: tuple[tuple[float | None, float, GateDecision | None], ...]


class Ready(_Message, tag=1):
    """To the engine: the worker serves."""


class Submit(_Message, tag=2):
    """To the engine: a request, with its inputs at `start` of the worker's arena: the engine's until it answers."""

    request: int
    model: int
    start: int
    num_rows: int
    arrival_s: float | None
    options: WrittenOptions


class Cancel(_Message, tag=3):
    """To the engine: nobody waits for a request any more. It is answered all the same."""

    request: int


class Rejected(_Message, tag=4):
    """To the engine: a request was refused before it was submitted; to be counted."""

    model: str
    version: str
    reason: str


class Relayed(_Message, tag=5):
    """To the engine: an HTTP request that it is to answer itself."""

    request: int
    method: str
    path: str
    query: bytes
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes


class Synced(_Message, tag=6):
    """To the engine: the catalogue of that number is what the worker goes by now."""

    number: int


class Welcome(_Message, tag=20):
    """To the worker, first of all: the operator's settings as JSON, and how lines of the log look."""

    settings: bytes
    log_format: str


class ModelAdded(_Message, tag=21):
    """To the worker: requests may name this model from now on, by its number."""

    model: int
    name: str
    version: str
    files: dict[str, bytes]


class ModelGone(_Message, tag=22):
    """To the worker: no request may name this model any more."""

    model: int


class Listed(_Message):
    """An entry of the catalogue."""

    name: str
    model: int | None
    reason: str
    is_loading: bool
    is_held_back: bool


class CatalogueChanged(_Message, tag=23):
    """To the worker: which models answer to which names. It says `Synced` when it goes by it."""

    number: int
    entries: tuple[Listed, ...]


class Stop(_Message, tag=28):
    """To the worker: finish what is under way, then end."""


class WrittenResult(_Message, tag=24):
    """To the worker: a request's one `Result`. Its inputs' memory is the worker's again.

    Attributes:
        rows: Per row an answer, or None where its answer is an error.
        errors: Those, in order: untagged arrays in one list could not be told apart.
    """

    request: int
    rows: tuple[WrittenRow | None, ...]
    errors: tuple[WrittenError, ...]
    queue_s: float
    compute_s: float
    total_s: float
    budget_ms: float | None
    gear: int | None


class WrittenProgress(_Message, tag=25):
    """To the worker: a row of a request has reached an exit."""

    request: int
    row: int
    answer: WrittenExit
    depth: float


class Refused(_Message, tag=26):
    """To the worker: a request was not admitted. Its inputs' memory is the worker's again."""

    request: int
    error: WrittenError


class RelayAnswer(_Message, tag=27):
    """To the worker: the engine's own answer to an HTTP request."""

    request: int
    status: int
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes


ToEngine = Ready | Submit | Cancel | Rejected | Relayed | Synced
Event = WrittenResult | WrittenProgress
ToWorker = Welcome | ModelAdded | ModelGone | CatalogueChanged | Event | Refused | RelayAnswer | Stop

_encoder: Final = msgspec.msgpack.Encoder()
_to_engine: Final = msgspec.msgpack.Decoder(ToEngine)
_to_worker: Final = msgspec.msgpack.Decoder(ToWorker)


def encode(message: ToEngine | ToWorker) -> bytes:
    """Write a message."""
    return _encoder.encode(message)


def decode_for_engine(message: bytes) -> ToEngine:
    """Read what a worker says.

    Raises:
        msgspec.ValidationError: If it is not such a message.
    """
    decoded: ToEngine = _to_engine.decode(message)
    return decoded


def decode_for_worker(message: bytes) -> ToWorker:
    """Read what the engine says.

    Raises:
        msgspec.ValidationError: If it is not such a message.
    """
    decoded: ToWorker = _to_worker.decode(message)
    return decoded
