"""Every byte has one owner at a time, whoever asks for how much in which order."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from offramp_contract.errors import TooLarge
from offramp_server.http_workers.arena import ALIGNMENT, Arena, Span, Spans, aligned

SIZE = 16 * ALIGNMENT
STEPS = st.lists(st.tuples(st.booleans(), st.integers(0, SIZE), st.integers(0, 1000)), max_size=60)


def overlaps(one: Span, other: Span) -> bool:
    return one.start < other.end and other.start < one.end


@given(STEPS)
def test_no_byte_has_two_owners_and_all_are_free_at_the_end(steps):
    arena = Arena(SIZE)
    lent, waiting = [], []

    def taker(num_bytes):
        place = []  # the borrower, once it waits

        def take(span):
            assert span.end - span.start == aligned(max(num_bytes, 1))
            assert 0 <= span.start < span.end <= SIZE
            assert span.start % ALIGNMENT == 0
            assert not any(overlaps(span, other) for other in [*lent, *arena.free])
            lent.append(span)
            waiting[:] = [one for one in waiting if one not in place]

        return take, place

    for is_lending, num_bytes, choice in steps:
        if is_lending:
            take, place = taker(num_bytes)
            borrower = arena.lend(num_bytes, take)
            if borrower is not None:
                place.append(borrower)
                waiting.append(borrower)
        elif waiting and choice % 3 == 0:
            arena.withdraw(waiting.pop(choice % len(waiting)))
        elif lent:
            arena.give_back(lent.pop(choice % len(lent)))
        assert sum(span.end - span.start for span in [*lent, *arena.free]) == SIZE
        assert not any(one.end == other.start for one in arena.free for other in arena.free)
        assert not waiting or lent, "someone waits although everything is free"
    while lent:
        arena.give_back(lent.pop())
    assert not waiting, "someone waits for ever"
    assert arena.free == (Span(0, SIZE),)


def test_who_came_first_is_served_first_even_if_a_later_one_would_fit():
    arena = Arena(2 * ALIGNMENT)
    order = []
    spans = []
    arena.lend(ALIGNMENT, spans.append)
    assert arena.lend(2 * ALIGNMENT, lambda span: (order.append("large"), spans.append(span))) is not None
    assert arena.lend(ALIGNMENT, lambda span: (order.append("small"), spans.append(span))) is not None
    arena.give_back(spans.pop(0))
    assert order == ["large"]
    arena.give_back(spans.pop(0))
    assert order == ["large", "small"]


def test_who_stops_waiting_lets_those_behind_it_pass():
    arena = Arena(2 * ALIGNMENT)
    spans = []
    arena.lend(ALIGNMENT, spans.append)
    large = arena.lend(2 * ALIGNMENT, spans.append)
    arena.lend(ALIGNMENT, spans.append)
    arena.withdraw(large)
    assert spans == [Span(0, ALIGNMENT), Span(ALIGNMENT, 2 * ALIGNMENT)]
    arena.withdraw(large)  # a second time is nothing


def test_what_never_fits_is_refused_at_once_and_names_the_setting():
    with pytest.raises(TooLarge, match="http_worker_memory_bytes"):
        Arena(ALIGNMENT).lend(ALIGNMENT + 1, lambda span: None)


@pytest.mark.parametrize("again", [Span(0, ALIGNMENT), Span(ALIGNMENT, 3 * ALIGNMENT)])
def test_bytes_that_are_given_back_twice_are_a_bug(again):
    spans = Spans(4 * ALIGNMENT)
    taken = spans.take(2 * ALIGNMENT)
    spans.give_back(taken)
    with pytest.raises(RuntimeError, match="this is a bug"):
        spans.give_back(again)
