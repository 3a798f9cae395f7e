from __future__ import annotations

import pytest

from router.load import Booked, LoadBook
from workers.protocol.messages import Load


def test_booked_once_released_exactly_once():
    book = LoadBook()
    first = book.book("w", prefill_tokens=100)
    second = book.book("w", decode_blocks=7)
    assert book.booked("w") == Booked(prefill_tokens=100, prefill_pairs=5000, decode_blocks=7, requests=2)
    first.release()
    with pytest.raises(RuntimeError, match="twice"):
        first.release()
    second.release()
    assert book.booked("w") == Booked()
    assert book.num_open == 0


def test_load_now_is_what_others_have_there_and_what_we_have_booked():
    book = LoadBook()
    ours = book.book("w", prefill_tokens=100, decode_blocks=10)
    book.report("w", Load(queued_prefill_tokens=250, active_blocks=40))
    assert (book.queued_prefill_tokens("w"), book.active_blocks("w")) == (250, 40)
    later = book.book("w", prefill_tokens=30, decode_blocks=3)  # the report can't know of it
    assert (book.queued_prefill_tokens("w"), book.active_blocks("w")) == (280, 43)
    ours.release()  # nor of this
    assert (book.queued_prefill_tokens("w"), book.active_blocks("w")) == (180, 33)
    later.release()
    assert (book.queued_prefill_tokens("w"), book.active_blocks("w")) == (150, 30)


def test_a_report_from_before_our_booking_arrived_hides_nothing():
    book = LoadBook()
    book.book("w", prefill_tokens=100)
    book.report("w", Load(queued_prefill_tokens=0))
    assert book.queued_prefill_tokens("w") == 100


def test_bookings_outlive_the_worker():
    book = LoadBook()
    old = book.book("w", decode_blocks=5)
    book.forget("w")
    assert book.active_blocks("w") == 0
    book.book("w", decode_blocks=1)  # its next life
    old.release()
    assert book.active_blocks("w") == 1
    assert book.num_open == 1


def test_what_is_ours_shrinks_while_it_is_computed_oldest_first():
    book = LoadBook()
    book.report("w", Load(prompt_tokens=5000))  # what it did before we came
    first = book.book("w", prefill_tokens=100)
    book.report("w", Load(prompt_tokens=5060, queued_prefill_tokens=40))
    assert book.queued_prefill_tokens("w") == 40
    second = book.book("w", prefill_tokens=200)
    book.report("w", Load(prompt_tokens=5150, queued_prefill_tokens=150))
    assert (first.prefill_tokens, second.prefill_tokens) == (0, 150)
    assert book.queued_prefill_tokens("w") == 150
    first.release()
    assert book.queued_prefill_tokens("w") == 150
    second.release()
    assert book.booked("w") == Booked()


def test_a_worker_that_has_computed_much_before_is_not_thought_to_have_computed_ours():
    book = LoadBook()
    book.book("w", prefill_tokens=100)
    book.report("w", Load(prompt_tokens=10**6))
    assert book.queued_prefill_tokens("w") == 100


def test_what_others_have_there_is_not_lost_when_their_work_is_taken_for_ours():
    book = LoadBook()
    book.report("w", Load(queued_prefill_tokens=300))
    ours = book.book("w", prefill_tokens=100)
    book.report("w", Load(prompt_tokens=250, queued_prefill_tokens=150))  # it has done theirs, in truth
    assert book.queued_prefill_tokens("w") == 150
    ours.release()
    assert book.queued_prefill_tokens("w") == 150, "until the next report"


def test_the_end_of_a_long_prompt_attends_to_more_than_its_beginning():
    book = LoadBook()
    book.report("w", Load())
    booking = book.book("w", prefill_tokens=60, prompt_tokens=100)
    in_all = sum(position + 0.5 for position in range(40, 100))
    assert book.account("w").queued_prefill_pairs == booking.prefill_pairs == in_all
    book.report("w", Load(prompt_tokens=50, queued_prefill_tokens=10))
    assert book.account("w").queued_prefill_pairs == sum(position + 0.5 for position in range(90, 100))
    book.report("w", Load(prompt_tokens=50, queued_prefill_tokens=15, queued_prefill_pairs=2000))
    assert book.account("w").queued_prefill_pairs == 2000, "somebody else's, too"
    booking.release()
    assert book.booked("w") == Booked()
