from __future__ import annotations

from collections import defaultdict
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from workers.transfer.outbox import Outbox


def filled(**counts: int) -> Outbox[str]:
    outbox: Outbox[str] = Outbox()
    for name, count in counts.items():
        for index in range(count):
            outbox.put(name, f"{name}{index}")
    return outbox


def drained(outbox: Outbox[str]) -> list[str]:
    found = []
    while outbox.has_piece():
        found.append(outbox.take())
    return found


def test_transfers_take_turns_and_keep_their_own_order() -> None:
    assert drained(filled(a=4, b=1, c=2)) == ["a0", "b0", "c0", "a1", "c1", "a2", "a3"]


def test_whoever_comes_later_waits_for_one_piece_of_each_before_it() -> None:
    outbox = filled(a=100, b=100)
    assert [outbox.take(), outbox.take(), outbox.take()] == ["a0", "b0", "a1"]
    outbox.put("c", "c0")
    assert [outbox.take(), outbox.take(), outbox.take()] == ["b1", "a2", "c0"]


def test_a_transfer_that_was_empty_for_a_moment_goes_to_the_end() -> None:
    outbox = filled(a=1, b=2)
    assert outbox.take() == "a0"
    outbox.put("a", "a1")
    assert drained(outbox) == ["b0", "a1", "b1"]


def test_dropping_one_leaves_the_others_in_order() -> None:
    outbox = filled(a=3, b=3, c=1)
    assert outbox.take() == "a0"
    assert outbox.drop("b") == ["b0", "b1", "b2"]
    assert outbox.drop("b") == []
    assert drained(outbox) == ["c0", "a1", "a2"]


def test_messages_stand_beside_pieces() -> None:
    outbox = filled(a=2)
    outbox.put_message("x")
    outbox.put_message("y")
    assert len(outbox) == 4
    assert outbox.has_message()
    assert (outbox.take_message(), outbox.take(), outbox.take_message()) == ("x", "a0", "y")
    assert not outbox.has_message()
    outbox.put_message("z")
    assert outbox.drop_all() == ["a1"]
    assert len(outbox) == 0
    assert not outbox.has_message()
    assert not outbox.has_piece()


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["put", "put", "take", "drop"]))))
def test_everything_that_is_put_comes_out_once_and_nobody_is_passed_over_twice(
    moves: list[tuple[str, str]],
) -> None:
    outbox: Outbox[Any] = Outbox()
    waiting: dict[str, list[int]] = defaultdict(list)
    overtaken: dict[str, int] = defaultdict(int)  # turns that others had since this one began to wait
    for index, (name, move) in enumerate(moves):
        if move == "put":
            if not waiting[name]:
                overtaken[name] = 0
            waiting[name].append(index)
            outbox.put(name, (name, index))
        elif move == "drop":
            assert [i for _, i in outbox.drop(name)] == waiting[name]
            waiting[name] = []
        elif outbox.has_piece():
            taken, number = outbox.take()
            assert number == waiting[taken].pop(0)
            overtaken[taken] = 0
            for other in "abc":
                if other != taken and waiting[other]:
                    overtaken[other] += 1
                    assert overtaken[other] <= 2, "two others may each go once"
        assert len(outbox) == sum(map(len, waiting.values()))
        assert outbox.has_piece() == (len(outbox) > 0)
