"""ONNX Runtime sessions, with thread counts set on purpose.

Every session has a pool of its own whose threads do not spin. One process-wide pool would make fewer threads, but
ONNX Runtime offers no way to stop *its* threads from spinning between dispatches, which burns the cores that HTTP
needs: measured on 2 cores, 14 ms of CPU time for a run of 4 ms, against 4 ms with pools that block.
"""

from collections.abc import Sequence

import onnxruntime as ort
from offramp_contract.errors import ManifestError

from offramp_runtime.weights import Weights, parse_closed

_ONLY_ERRORS = 3


def create_session(
    graph: bytes,
    name: str,
    providers: Sequence[str],
    threads: int,
    provider_options: Sequence[dict[str, str]] | None = None,
    *,
    shared: Weights | None = None,
) -> ort.InferenceSession:
    """Create a session from a graph's bytes.

    Args:
        graph: A serialised ONNX model with its weights inside.
        name: For messages.
        providers: Execution providers, the wanted one first.
        threads: Threads that its operators run on.
        provider_options: One dict per provider.
        shared: Initializers whose data in the graph is the same as these arrays', which the session uses in its stead.

    Raises:
        ManifestError: If the graph refers to other files, or ONNX Runtime refuses it.
    """
    parse_closed(graph, name)
    options = ort.SessionOptions()
    options.log_severity_level = _ONLY_ERRORS
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    lent = {weight: ort.OrtValue.ortvalue_from_numpy(array) for weight, array in (shared or {}).items()}
    for weight, value in lent.items():
        options.add_initializer(weight, value)
    try:
        session = ort.InferenceSession(
            graph, options, providers=list(providers), provider_options=provider_options, enable_fallback=False
        )
    except Exception as error:  # ONNX Runtime raises a dozen unrelated types, none of them public
        raise ManifestError(f"ONNX Runtime refuses the graph of {name!r} ({type(error).__name__})") from error
    # ONNX Runtime's own hold on lent values is a bare pointer: the session object must keep them alive.
    session.lent = lent
    # It also keeps the graph's bytes, weights and all, for changing providers later, which nobody does here.
    session._model_bytes = None
    return session
