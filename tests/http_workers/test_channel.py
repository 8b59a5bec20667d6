"""Messages arrive whole, in order and once, however the stream is cut."""

import asyncio
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st
from offramp_server.http_workers import channel
from offramp_server.http_workers.channel import HEADER, Channel, Deframer, FrameTooLarge, framed

MESSAGES = st.lists(st.binary(max_size=40), max_size=12)


@given(MESSAGES, st.lists(st.integers(1, 60), min_size=1, max_size=20))
def test_messages_arrive_whole_in_order_and_once_however_the_stream_is_cut(messages, cuts):
    stream = b"".join(map(framed, messages))
    deframer, arrived = Deframer(), []
    position, turn = 0, 0
    while position < len(stream):
        size = cuts[turn % len(cuts)]
        arrived += deframer.feed(stream[position : position + size])
        position, turn = position + size, turn + 1
    assert arrived == messages


@given(st.binary(max_size=200))
def test_bytes_that_are_no_frames_give_messages_or_a_refusal_and_nothing_else(stream):
    try:
        messages = Deframer().feed(stream)
    except FrameTooLarge:
        return
    assert sum(HEADER.size + len(message) for message in messages) <= len(stream)


def test_a_message_that_claims_to_be_too_large_is_refused_before_it_is_kept(monkeypatch):
    monkeypatch.setattr(channel, "MAX_FRAME_BYTES", 10)
    with pytest.raises(FrameTooLarge):
        framed(b"x" * 11)
    deframer = Deframer()
    assert deframer.feed(framed(b"x" * 10) + b"\x0b") == [b"x" * 10]
    with pytest.raises(FrameTooLarge):
        deframer.feed(b"\x00\x00\x00")


class End:
    """One end of a channel."""

    def __init__(self):
        self.messages = []
        self.lost = asyncio.Event()
        self.came = asyncio.Event()
        self.channel = Channel(self.receive, self.lost.set)

    def receive(self, message):
        if message == b"a bug":
            raise ValueError(message)
        self.messages.append(message)
        self.came.set()


async def connected():
    ours, theirs = End(), End()
    for end, side in zip((ours, theirs), socket.socketpair(), strict=True):
        side.setblocking(False)
        await asyncio.get_running_loop().create_connection(lambda end=end: end.channel, sock=side)
    return ours, theirs


def test_each_side_learns_that_the_other_has_gone_and_may_still_send_into_the_void():
    async def talk():
        ours, theirs = await connected()
        ours.channel.send(b"hello")
        await theirs.came.wait()
        theirs.channel.abort()
        await ours.lost.wait()
        ours.channel.send(b"anybody?")
        return theirs.messages

    assert asyncio.run(talk()) == [b"hello"]


def test_a_message_that_cannot_be_taken_ends_the_channel(caplog):
    async def talk():
        ours, theirs = await connected()
        ours.channel.send(b"a bug")
        await ours.lost.wait()
        await theirs.lost.wait()

    asyncio.run(talk())
    assert "breaks off" in caplog.text


def test_a_side_that_does_not_read_any_more_is_given_up(monkeypatch, caplog):
    monkeypatch.setattr(channel, "MAX_BACKLOG_BYTES", 100_000)

    async def talk():
        ours = End()
        side, silent = socket.socketpair()
        side.setblocking(False)
        await asyncio.get_running_loop().create_connection(lambda: ours.channel, sock=side)
        with silent:
            for _ in range(100):
                ours.channel.send(b"x" * 50_000)
            await ours.lost.wait()

    asyncio.run(talk())
    assert "does not read" in caplog.text
