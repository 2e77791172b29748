"""Splits: disjoint, of exactly the asked sizes, or an error that says what falls short and what would fit."""

from __future__ import annotations

import re
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.base.errors import DataError
from fedsim.data.splits import Demand, Splits, split_rows
from fedsim.data.square import SquareRow, load_square

NAMES = ("federated", "guard", "cai")


def rows(num_red: int, num_acceptable: int, per_question: int = 1) -> list[SquareRow]:
    labels = [True] * num_red + [False] * num_acceptable
    labels = [labels[(i * 7919) % len(labels)] for i in range(len(labels))] if len(labels) % 7919 else labels
    return [SquareRow(i, f"Kite {i // per_question}?", "r", red, (), "") for i, red in enumerate(labels)]


def counts(data: list[SquareRow], part: list[int]) -> tuple[int, int]:
    red = sum(data[i].red for i in part)
    return red, len(part) - red


def check_disjoint(data: list[SquareRow], made: Splits) -> None:
    used = [i for part in made.parts.values() for i in part]
    assert len(used) == len(set(used)) and set(used) <= set(range(len(data)))
    left = set(range(len(data))) - set(used)
    assert (made.leftover_red, made.leftover_acceptable) == counts(data, sorted(left))


@pytest.mark.parametrize(
    ("num", "share", "red"), [(20000, 0.3, 6000), (20000, 0.5, 10000), (9, 0.5, 5), (7, 1.0, 7), (0, 0.5, 0)]
)  # fmt: skip
def test_demand_rounds_to_whole_rows(num: int, share: float, red: int) -> None:
    demand = Demand.of("x", num, share)
    assert (demand.num_red, demand.num_acceptable, demand.num_rows) == (red, num - red, num)


Sizes = tuple[tuple[int, int], ...]
SIZES = st.tuples(*[st.tuples(st.integers(0, 25), st.integers(0, 25)) for _ in NAMES])


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 60), st.integers(0, 60), SIZES, st.integers(0, 3))
def test_exact_counts_or_a_true_shortage(have_red: int, have_ok: int, sizes: Sizes, seed: int) -> None:
    data = rows(have_red, have_ok)
    demands = [Demand(n, *s) for n, s in zip(NAMES, sizes, strict=True)]
    short = [max(0, sum(s[i] for s in sizes) - have) for i, have in enumerate((have_red, have_ok))]
    if any(short):
        with pytest.raises(DataError) as caught:
            split_rows(data, demands, seed, fit=False, group_by_question=False)
        text = str(caught.value)
        for number, label, have in zip(short, ("red", "acceptable"), (have_red, have_ok), strict=True):
            assert (
                (f"{number} {label} rows short" in text and f"{have} in the file" in text)
                if number
                else label not in text
            )
    else:
        made = split_rows(data, demands, seed, fit=False, group_by_question=False)
        assert [counts(data, made.parts[n]) for n in NAMES] == list(sizes) and made.factor == 1.0
        check_disjoint(data, made)


@settings(max_examples=150, deadline=None)
@given(st.integers(5, 60), st.integers(5, 60), SIZES)
def test_fit_shrinks_all_demands_by_the_largest_factor(have_red: int, have_ok: int, sizes: Sizes) -> None:
    data = rows(have_red, have_ok)
    demands = [Demand(n, *s) for n, s in zip(NAMES, sizes, strict=True)]
    asked = [sum(s[i] for s in sizes) for i in range(2)]
    factor = min([Fraction(1), *(Fraction(h, a) for h, a in zip((have_red, have_ok), asked, strict=True) if a)])
    wanted = [(int(r * factor), int(a * factor)) for r, a in sizes]
    if any(sum(s) and not sum(w) for s, w in zip(sizes, wanted, strict=True)):
        with pytest.raises(DataError, match="nothing is left for the"):
            split_rows(data, demands, 0, fit=True, group_by_question=False)
        return
    made = split_rows(data, demands, 0, fit=True, group_by_question=False)
    assert [counts(data, made.parts[n]) for n in NAMES] == wanted
    assert made.factor == float(factor)
    check_disjoint(data, made)


def test_the_error_names_sizes_that_fit() -> None:
    data = rows(265, 215)
    demands = [Demand.of("federated", 2000, 0.3), Demand.of("guard", 2000, 0.5), Demand.of("cai", 400, 0.5)]
    with pytest.raises(DataError) as caught:
        split_rows(data, demands, 0, fit=False, group_by_question=False)
    text = str(caught.value)
    assert "1535 red rows short (1800 asked, 265 in the file)" in text
    assert "2385 acceptable rows short (2600 asked, 215 in the file)" in text
    assert "data.fit=true" in text
    sizes = {name: int(size) for name, size in re.findall(r"data\.(\w+)_rows=(\d+)", text)}
    assert set(sizes) == set(NAMES)
    smaller = [Demand.of(n, sizes[n], s) for n, s in zip(NAMES, (0.3, 0.5, 0.5), strict=True)]
    split_rows(data, smaller, 0, fit=False, group_by_question=False)
    larger = [Demand.of(d.name, round(d.num_rows * 1.1), s) for d, s in zip(smaller, (0.3, 0.5, 0.5), strict=True)]
    with pytest.raises(DataError):
        split_rows(data, larger, 0, fit=False, group_by_question=False)


def test_draws_depend_on_the_seed_alone() -> None:
    data, demands = rows(40, 60), [Demand("federated", 10, 20), Demand("guard", 10, 10)]
    first = split_rows(data, demands, 1, fit=False, group_by_question=False)
    assert first == split_rows(data, demands, 1, fit=True, group_by_question=False)
    other = split_rows(data, demands, 2, fit=False, group_by_question=False)
    assert first.parts["federated"] != other.parts["federated"]
    labels = [data[i].red for i in first.parts["federated"]]
    assert labels != sorted(labels) and labels != sorted(labels, reverse=True), "in drawn order, not by label"


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 4), st.integers(0, 3))
def test_grouped_questions_stay_in_one_split(per_question: int, seed: int) -> None:
    data = rows(60, 80, per_question)
    demands = [Demand("federated", 12, 24), Demand("guard", 10, 10), Demand("cai", 0, 0)]
    made = split_rows(data, demands, seed, fit=True, group_by_question=True)
    check_disjoint(data, made)
    owner: dict[str, str] = {}
    for name, part in made.parts.items():
        for i in part:
            assert owner.setdefault(data[i].prompt, name) == name
    assert made.parts["cai"] == []
    if made.factor == 1:
        assert [counts(data, made.parts[n]) for n in NAMES] == [(12, 24), (10, 10), (0, 0)]


def test_grouping_that_cannot_fit_says_what_does() -> None:
    data = rows(50, 50, per_question=5)
    demands = [Demand("federated", 25, 25), Demand("guard", 25, 25)]
    with pytest.raises(DataError, match=r"data\.group_by_question: 100 rows do not fit") as caught:
        split_rows(data, demands, 0, fit=False, group_by_question=True)
    sizes = [int(size) for size in re.findall(r"_rows=(\d+)", str(caught.value))]
    assert len(sizes) == 2 and min(sizes) > 0 and sum(sizes) < 100
    one = [SquareRow(i, "the same?", "r", i % 2 == 0, (), "") for i in range(10)]
    with pytest.raises(DataError, match="1 questions are too few to be shared by 2 splits"):
        split_rows(one, [Demand("federated", 2, 2), Demand("guard", 2, 2)], 0, fit=True, group_by_question=True)


def test_a_file_without_enough_rows_says_so_grouped_or_not() -> None:
    data, demands = rows(10, 10), [Demand("federated", 30, 5), Demand("guard", 1, 1)]
    for grouped in (False, True):
        with pytest.raises(DataError, match="21 red rows short"):
            split_rows(data, demands, 0, fit=False, group_by_question=grouped)


def test_the_real_file_is_split_by_question(real_data: Path) -> None:
    data = load_square(real_data / "square" / "response_test_ood.json").rows
    demands = [Demand.of("federated", 2000, 0.3), Demand.of("guard", 2000, 0.5), Demand.of("cai", 400, 0.5)]
    made = split_rows(data, demands, 0, fit=True, group_by_question=True)
    check_disjoint(data, made)
    prompts = [{data[i].prompt for i in part} for part in made.parts.values()]
    assert sum(map(len, prompts)) == len(set().union(*prompts))
    assert all(part for part in made.parts.values())
