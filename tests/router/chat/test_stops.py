from __future__ import annotations

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from router.chat.stops import StopAutomaton, StopScanner

LETTERS = st.text(alphabet="ab€", max_size=40)
STOPS = st.lists(st.text(alphabet="ab€", min_size=1, max_size=5), min_size=1, max_size=5)


def split(text: str, cuts: list[int]) -> list[str]:
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    return [text[start:end] for start, end in itertools.pairwise(edges)]


def expected(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """By str.find on the whole text: the match that is complete first, the longest of those."""
    matches = [(text.find(stop) + len(stop), text.find(stop), stop) for stop in stops if stop in text]
    if not matches:
        return text, None
    end, start, stop = min(matches)
    return text[: end if include else start], stop


@given(text=LETTERS, stops=STOPS, cuts=st.lists(st.integers(0, 40), max_size=10), include=st.booleans())
@settings(max_examples=1000, deadline=None)
def test_cuts_where_find_does_however_the_text_is_split(
    text: str, stops: list[str], cuts: list[int], include: bool
) -> None:
    scanner = StopScanner(StopAutomaton(tuple(stops)), include)
    shown = ""
    for piece in split(text, cuts):
        shown += scanner.push(piece)
        whole, _ = expected(text, stops, include)
        assert whole.startswith(shown)  # nothing is ever shown that must be taken back
    shown += scanner.finish()
    assert (shown, scanner.found) == expected(text, stops, include)


@given(text=LETTERS, stops=STOPS)
@settings(max_examples=500, deadline=None)
def test_holds_back_only_what_may_become_a_stop_string(text: str, stops: list[str]) -> None:
    scanner = StopScanner(StopAutomaton(tuple(stops)))
    shown = scanner.push(text)
    if scanner.found is None:
        longest = max(length for stop in stops for length in range(len(stop)) if text.endswith(stop[:length]))
        assert shown == text[: len(text) - longest]


def test_spans_pieces_and_stays_silent_afterwards() -> None:
    scanner = StopScanner(StopAutomaton(("</answer>",)))
    assert [scanner.push(piece) for piece in ["hi <", "/ans", "wer", "> more", "and more"]] == [
        "hi ",
        "",
        "",
        "",
        "",
    ]
    assert scanner.found == "</answer>"
    assert scanner.finish() == ""


def test_include_holds_nothing_back() -> None:
    scanner = StopScanner(StopAutomaton(("END",)), include_stop=True)
    assert [scanner.push(piece) for piece in ["aE", "N", "Dx"]] == ["aE", "N", "D"]
