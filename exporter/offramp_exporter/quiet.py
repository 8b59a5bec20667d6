"""Keeps torch's own talk from the user, and overhears the one line of it that matters."""

import io
import logging
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from types import FrameType
from typing import Final

from offramp_exporter.refusal import is_users_code, spell_line

_TALKERS: Final = ("torch", "onnxscript", "onnx_ir")
_SHAPES: Final = "torch.fx.experimental.symbolic_shapes"
_FIXES_A_SIZE: Final = re.compile(r"eval Eq\(s\d+, \d+\)")


class Overheard(logging.Handler):
    """Notes which line of the network made torch assume something about the batch size.

    torch logs each such guard while the network's own code is on the stack; its final error no longer knows the line.

    Attributes:
        line: The line that fixed the size, or else the first that restricted it; None if none did.
    """

    def __init__(self) -> None:
        super().__init__()
        self.line: str | None = None
        self._is_fixed = False

    def emit(self, record: logging.LogRecord) -> None:
        """Look at the stack if the record speaks of a new guard."""
        message = record.getMessage()
        fixes = _FIXES_A_SIZE.match(message) is not None
        if "[guard added]" in message and (self.line is None or (fixes and not self._is_fixed)):
            self.line = _users_line(sys._getframe()) or self.line
            self._is_fixed = fixes


@contextmanager
def overhearing() -> Iterator[Overheard]:
    """Swallow warnings, log lines and prints: what matters of them ends in a TraceError."""
    overheard = Overheard()
    loggers = [logging.getLogger(name) for name in (*_TALKERS, _SHAPES, *_their_loggers())]
    kept = [(logger, list(logger.handlers), logger.propagate, logger.level) for logger in loggers]
    try:
        for logger in loggers:
            logger.handlers, logger.propagate = [overheard], False
        logging.getLogger(_SHAPES).setLevel(logging.INFO)
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield overheard
    finally:
        for logger, handlers, propagates, level in kept:
            logger.handlers, logger.propagate = handlers, propagates
            logger.setLevel(level)


def _their_loggers() -> list[str]:
    return [name for name in logging.root.manager.loggerDict if name.split(".")[0] in _TALKERS]


def _users_line(frame: FrameType | None) -> str | None:
    while frame is not None and not is_users_code(frame.f_code.co_filename):
        frame = frame.f_back
    return None if frame is None else spell_line(frame.f_code.co_filename, frame.f_lineno)
