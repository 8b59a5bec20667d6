"""ONNX Runtime sessions, with thread counts set on purpose.

Every session has a pool of its own whose threads do not spin. One process-wide pool would make fewer threads, but
ONNX Runtime offers no way to stop *its* threads from spinning between dispatches, which burns the cores that HTTP
needs: measured on 2 cores, 14 ms of CPU time for a run of 4 ms, against 4 ms with pools that block.
"""

from collections.abc import Sequence

import onnxruntime as ort
from google.protobuf.message import DecodeError, Message
from offramp_contract.errors import ManifestError
from onnx import ModelProto, TensorProto

_ONLY_ERRORS = 3


def create_session(
    graph: bytes,
    name: str,
    providers: Sequence[str],
    threads: int,
    provider_options: Sequence[dict[str, str]] | None = None,
) -> ort.InferenceSession:
    """Create a session from a graph's bytes.

    Args:
        graph: A serialised ONNX model with its weights inside.
        name: For messages.
        providers: Execution providers, the wanted one first.
        threads: Threads that its operators run on.
        provider_options: One dict per provider.

    Raises:
        ManifestError: If the graph refers to other files, or ONNX Runtime refuses it.
    """
    _refuse_external_data(graph, name)
    options = ort.SessionOptions()
    options.log_severity_level = _ONLY_ERRORS
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        return ort.InferenceSession(
            graph, options, providers=list(providers), provider_options=provider_options, enable_fallback=False
        )
    except Exception as error:  # ONNX Runtime raises a dozen unrelated types, none of them public
        raise ManifestError(f"ONNX Runtime refuses the graph of {name!r} ({type(error).__name__})") from error


def _refuse_external_data(graph: bytes, name: str) -> None:
    """Refuse weights in other files: no digest covers them, and ONNX Runtime reads them from any relative path."""
    try:
        model = ModelProto.FromString(graph)
    except DecodeError:
        raise ManifestError(f"graph of {name!r} is not an ONNX model") from None
    if _has_external_data(model):
        raise ManifestError(f"graph of {name!r} keeps weights in other files; a bundle's graphs hold their own")


def _has_external_data(message: Message) -> bool:
    if isinstance(message, TensorProto):
        return message.data_location == TensorProto.EXTERNAL or len(message.external_data) > 0
    return any(
        _has_external_data(part)
        for field, value in message.ListFields()
        if field.message_type is not None
        for part in ([value] if isinstance(value, Message) else value)
    )
