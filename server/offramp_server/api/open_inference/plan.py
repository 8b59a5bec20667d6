"""What the words of an inference request ask for, checked once for all requests that have the same words."""

from dataclasses import dataclass, replace
from typing import Final

from offramp_contract.errors import InvalidValue

from offramp_server.api.open_inference.outputs import needs_logits, requested_outputs
from offramp_server.api.open_inference.request import RequestedOutput, Wording, read_wording
from offramp_server.fields import Routing, read_routing
from offramp_server.inputs import conform
from offramp_server.messages import Inputs
from offramp_server.served import ServedModel
from offramp_server.settings import ServerSettings

MAX_PLANS: Final = 512
MAX_TEXT_BYTES: Final = 4096
"""Longer JSON is not kept: with `MAX_PLANS` this bounds the memory that clients can make the server hold."""
MICROSECONDS_PER_MS: Final = 1000.0


@dataclass(frozen=True, slots=True)
class Plan:
    """A request's words, understood.

    Attributes:
        wording: What they say.
        outputs: The outputs to answer with.
        routing: How the rows are routed.
    """

    wording: Wording
    outputs: tuple[RequestedOutput, ...]
    routing: Routing

    def inputs(self, body: bytes, served: ServedModel, max_rows: int) -> Inputs:
        """Give the model's inputs out of a body that begins with these words.

        Raises:
            InvalidValue, TooLarge: If the tensors are not what the model reads.
        """
        return conform(self.wording.arrays(body), served.manifest, max_rows)


def read_plan(text: bytes, num_bytes: int, served: ServedModel, settings: ServerSettings) -> Plan:
    """Understand a request's words.

    Args:
        text: The JSON.
        num_bytes: Length of the whole body.
        served: The model that is asked.
        settings: The operator's limits and defaults.

    Raises:
        RequestError: With a sentence that names the field and what is allowed.
    """
    wording = read_wording(text, num_bytes, served.manifest, settings.max_rows)
    outputs = requested_outputs(wording.outputs, wording.is_binary, served.manifest)
    return Plan(wording, outputs, _routing(wording, served, settings, outputs))


class Plans:
    """Remembers plans by the words they come from; the oldest goes first."""

    def __init__(self, settings: ServerSettings) -> None:
        self._settings = settings
        self._plans: dict[tuple[str, int, bytes], Plan] = {}

    def find(self, text: bytes, num_bytes: int, served: ServedModel) -> Plan:
        """Give the plan of a request's words; see `read_plan`."""
        key = served.key, num_bytes, text
        plan = self._plans.get(key)
        if plan is None:
            plan = read_plan(text, num_bytes, served, self._settings)
            if plan.wording.is_repeatable and len(text) <= MAX_TEXT_BYTES:
                if len(self._plans) >= MAX_PLANS:
                    del self._plans[next(iter(self._plans))]
                self._plans[key] = plan
        return plan


def _routing(
    wording: Wording, served: ServedModel, settings: ServerSettings, outputs: tuple[RequestedOutput, ...]
) -> Routing:
    """Check the parameters that route; of a `timeout` and a `latency_ms` the tighter one holds."""
    try:
        routing = read_routing(
            wording.fields,
            served.manifest,
            served.calibration,
            settings,
            otherwise=settings.defaults_of(served.name),
            wants_logits=needs_logits(outputs),
        )
    except InvalidValue as error:
        raise InvalidValue(f"parameters.{error.message}", error.field) from None
    options = routing.options
    if wording.timeout_us is None:
        return routing
    timeout_ms = wording.timeout_us / MICROSECONDS_PER_MS
    if timeout_ms > settings.max_latency_ms:
        limit_us = settings.max_latency_ms * MICROSECONDS_PER_MS
        raise InvalidValue(f"parameters.timeout: must be at most {limit_us:g} microseconds", "timeout")
    latency_ms = timeout_ms if options.latency_ms is None else min(timeout_ms, options.latency_ms)
    return replace(routing, options=replace(options, latency_ms=latency_ms))
