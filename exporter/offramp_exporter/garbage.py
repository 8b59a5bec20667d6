"""Python's garbage collector waits while torch traces: it would walk all of torch's objects over and over."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collected_later() -> Iterator[None]:
    """Pause the garbage collector; a tenth of the time that tracing a deep network takes is its own."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
