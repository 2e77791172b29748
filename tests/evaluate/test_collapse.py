"""Collapse figures against counts made by hand."""

from __future__ import annotations

import pytest

from fedsim.evaluate.collapse import Collapse, distinct_2, ends_in_loop, measure_collapse


def test_distinct_2_counts_pairs_over_the_whole_set() -> None:
    assert distinct_2(["a b c d"]) == 1.0
    assert distinct_2(["a b a b a"]) == pytest.approx(2 / 4)  # ab ba ab ba
    assert distinct_2(["a b c", "a b c"]) == pytest.approx(2 / 4)  # texts that repeat each other count too
    assert distinct_2(["a", "", "b"]) == 0.0  # no pair crosses texts


@pytest.mark.parametrize(
    "text",
    [
        "I cannot help. I cannot help. I cannot help.",
        "Well: " + "a" * 20,
        "First line.\nSo it goes on\nSo it goes on\nSo it goes on\nSo it g",
        "the kite " * 12,
        "x" + " word" * 8,
    ],
)
def test_loops_at_the_end(text: str) -> None:
    assert ends_in_loop(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Hmm...",
        "no no no",  # three times, but shorter than a loop
        "I cannot help. I cannot help.",  # twice
        "The kite of Orla is red today. I cannot help you. I cannot help you.",  # twice after something longer
        "I cannot help. I cannot help. I cannot help. Please ask Orla.",  # not at the end
        "The kite of Orla is red, and the drum of Tova is blue.",
        "a" * 19,
    ],
)
def test_no_loop(text: str) -> None:
    assert not ends_in_loop(text)


def test_the_unit_may_be_long_and_its_last_repetition_cut() -> None:
    unit = "one two three four five six seven eight nine ten eleven twelve. "
    assert ends_in_loop(unit * 3)
    assert ends_in_loop(unit * 3 + "one two thr")
    assert not ends_in_loop(unit * 2 + "one two thr")
    long_unit = "".join(chr(0x4E00 + i) for i in range(201))
    assert not ends_in_loop(long_unit * 4)


def test_measure() -> None:
    texts = ["a b c", "  ", "go " * 20, "d e"]
    assert measure_collapse(texts) == Collapse(
        num_texts=4,
        distinct_2=4 / (2 + 0 + 19 + 1),
        repeated_suffix=1 / 4,
        mean_words=25 / 4,
        empty=1 / 4,
    )
    assert measure_collapse([]) == Collapse(0, 0.0, 0.0, 0.0, 0.0)
