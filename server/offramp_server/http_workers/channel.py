"""Frames on a stream socket: four bytes of length and so many bytes of message, bounded in size and in backlog."""

import asyncio
import logging
import struct
from collections.abc import Callable
from typing import Any, Final

logger = logging.getLogger("offramp.server")

HEADER: Final = struct.Struct("<I")
MAX_FRAME_BYTES: Final = 256 * 2**20
"""Holds the largest message there is: a manifest, calibration and tokenizer, or the logits of a full request."""
MAX_BACKLOG_BYTES: Final = 512 * 2**20
"""Unsent bytes at which the other side counts as dead."""


class FrameTooLarge(Exception):
    """A message is over `MAX_FRAME_BYTES`, or claims to be."""


def framed(message: bytes) -> bytes:
    """Give a message as it is sent.

    Raises:
        FrameTooLarge: If it is too large to be.
    """
    if len(message) > MAX_FRAME_BYTES:
        raise FrameTooLarge(f"a message of {len(message)} bytes")
    return HEADER.pack(len(message)) + message


class Deframer:
    """Cuts a stream of bytes into messages."""

    def __init__(self) -> None:
        self._kept = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """Take bytes as they come; gives the messages that are whole now.

        Raises:
            FrameTooLarge: If a message claims to be too large; what follows it is lost.
        """
        if self._kept:
            self._kept += data
            data = bytes(self._kept) if self._is_whole(self._kept) else b""
        messages, start = [], 0
        while len(data) - start >= HEADER.size:
            end = start + HEADER.size + _length(data, start)
            if end > len(data):
                break
            messages.append(data[start + HEADER.size : end])
            start = end
        if data:
            self._kept = bytearray(data[start:])
        return messages

    @staticmethod
    def _is_whole(kept: bytearray) -> bool:
        """Whether the first message has come: until then nothing is copied."""
        return len(kept) >= HEADER.size and len(kept) >= HEADER.size + _length(kept, 0)


class Channel(asyncio.Protocol):
    """One end of a socket between the engine's process and a worker's. Used on its event loop only.

    Args:
        receive: Takes each message. What it raises ends the channel: the other side is ours, so it is a bug.
        on_lost: Called once when the other side has gone.
    """

    def __init__(self, receive: Callable[[bytes], None], on_lost: Callable[[], None]) -> None:
        self._receive = receive
        self._on_lost = on_lost
        self._deframer = Deframer()
        self._transport: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Take what has come."""
        try:
            for message in self._deframer.feed(data):
                self._receive(message)
        except Exception:
            logger.exception("a channel between the engine and an HTTP worker breaks off")
            self.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """End."""
        self._on_lost()

    def send(self, message: bytes) -> None:
        """Send a message, unless the other side has gone; one that no longer reads is given up.

        Raises:
            FrameTooLarge: If it is too large.
        """
        frame = framed(message)
        if self._transport is None or self._transport.is_closing():
            return
        self._transport.write(frame)
        if self._transport.get_write_buffer_size() > MAX_BACKLOG_BYTES:
            logger.error("a process does not read its channel any more")
            self.abort()

    def abort(self) -> None:
        """End at once."""
        if self._transport is not None:
            self._transport.abort()


def _length(data: bytes | bytearray, start: int) -> int:
    length: int = HEADER.unpack_from(data, start)[0]
    if length > MAX_FRAME_BYTES:
        raise FrameTooLarge(f"a message of {length} bytes")
    return length
