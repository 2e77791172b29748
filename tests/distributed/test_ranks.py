"""Agreement between ranks: order, errors, and that nobody is left waiting."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from fedsim.base.errors import DataError, FedsimError, RunError
from fedsim.federation.algorithms import ServerState
from fedsim.parallel.world import World, process_world
from fedsim.run.cohort import agreed_checksums

SIZES = (1, 2, 3, 4)


def joined() -> Any:
    """The world that the environment names."""
    return process_world(exact=True, threads=1, timeout_s=60, device="cpu")


def caught(call: Callable[[], Any]) -> tuple[str, str] | None:
    """Class and message of the error that a call raises."""
    try:
        call()
    except FedsimError as error:
        return type(error).__name__, str(error)
    return None


def share_work(num_units: int) -> dict[str, Any]:
    """Every operation of Ranks, with values that tell who did what."""
    with joined() as world:
        ranks = world.ranks
        done: list[int] = []
        costs = [float(1 + i % 5) for i in range(num_units)]
        by = ranks.map(lambda unit: (unit * unit, ranks.rank), range(num_units), costs, done.append)
        ranks.gather(None)
        return {
            "squares": [square for square, _ in by],
            "who": [rank for _, rank in by],
            "num_done": len(done),
            "gathered": ranks.gather(f"rank {ranks.rank}"),
            "nothing": ranks.gather(None),
            "once": ranks.once(lambda: ("from", ranks.rank)),
            "empty": ranks.map(lambda unit: unit, []),
        }


@pytest.mark.parametrize("size", SIZES)
def test_ranks_share_units_and_keep_their_order(pool: Any, size: int) -> None:
    found = pool.run(size, share_work, 17)
    for result in found:
        assert result["squares"] == [i * i for i in range(17)]
        assert result["who"] == found[0]["who"]
        assert result["gathered"] == [f"rank {r}" for r in range(size)]
        assert result["nothing"] == [None] * size  # one entry per rank, whatever it is
        assert result["once"] == ("from", 0)
        assert result["empty"] == []
    assert set(found[0]["who"]) == set(range(size))  # nobody is idle
    assert [result["num_done"] for result in found] == [found[0]["who"].count(r) for r in range(size)]


def fail_in_turn(bad_units: list[int]) -> dict[str, Any]:
    """Errors inside map and once, then one more operation that shows that the ranks are still in step."""
    with joined() as world:
        ranks = world.ranks

        def compute(unit: int) -> int:
            if unit in bad_units:
                raise DataError(f"unit {unit} is bad")
            return unit

        def bug() -> None:
            raise KeyError("lost")

        return {
            "map": caught(lambda: ranks.map(compute, range(8))),
            "once": caught(lambda: ranks.once(lambda: compute(bad_units[0]))),
            "bug": caught(lambda: ranks.once(bug)),
            "after": ranks.map(compute, [100, 101, 102]),
        }


@pytest.mark.parametrize("size", [2, 3, 4])
def test_an_error_on_one_rank_is_the_same_error_on_all(pool: Any, size: int) -> None:
    found = pool.run(size, fail_in_turn, [5])
    for result in found:
        assert result["map"] == ("DataError", "unit 5 is bad")
        assert result["once"] == ("DataError", "unit 5 is bad")
        assert result["bug"][0] == "RunError"
        assert result["bug"][1].startswith("KeyError: 'lost'")
        assert "Traceback" in result["bug"][1]
        assert result["after"] == [100, 101, 102]


def test_of_several_errors_all_ranks_raise_one(pool: Any) -> None:
    found = pool.run(4, fail_in_turn, [0, 1, 2, 3, 6])
    assert len({result["map"] for result in found}) == 1
    assert found[0]["map"] == ("DataError", "unit 0 is bad")  # the first by rank


def leave_by_error(bad_rank: int) -> str:
    """What leaves the world where one rank fails outside of any shared operation."""
    try:
        with joined() as world:
            if world.rank == bad_rank:
                raise RunError("the loss became NaN")
            dist.all_reduce(torch.zeros(3))
    except RunError as error:
        return str(error)
    except SystemExit as end:
        return f"exit {end.code}"
    return "done"


@pytest.mark.parametrize("bad_rank", [0, 1, 2])
def test_the_rank_that_fails_speaks_and_the_others_end_quietly(pool: Any, bad_rank: int) -> None:
    began = time.monotonic()
    found = pool.run(3, leave_by_error, bad_rank)
    assert found == ["the loss became NaN" if rank == bad_rank else "exit 2" for rank in range(3)]
    assert time.monotonic() - began < 30


def leave_alike() -> str:
    """All ranks raise the same error."""
    try:
        with joined() as world:
            world.ranks.once(lambda: {}["absent"])
    except RunError:
        return "spoke"
    except SystemExit as end:
        return f"exit {end.code}"
    return "done"


def test_of_ranks_that_fail_alike_one_speaks(pool: Any) -> None:
    assert sorted(pool.run(4, leave_alike)) == ["exit 2", "exit 2", "exit 2", "spoke"]


def checksums(changed_rank: int, bit: int) -> tuple[Any, Any]:
    """The checksums of a state on all ranks, and what happens if one rank's momentum differs in one bit."""
    with joined() as world:
        vector = torch.linspace(-1.0, 1.0, 1000)
        state = ServerState(vector.clone(), {"momentum": vector, "second_moment": vector + 1})
        agreed = agreed_checksums(state, world.ranks)
        if world.rank == changed_rank:
            vector.view(torch.int32)[617] ^= 1 << bit
        return agreed, caught(lambda: agreed_checksums(state, world.ranks))


@pytest.mark.parametrize("changed_rank", [0, 3])
def test_ranks_with_different_states_stop_the_run(pool: Any, changed_rank: int) -> None:
    found = pool.run(4, checksums, changed_rank, 0)
    agreed = found[0][0]
    assert agreed.keys() == {"adapter", "momentum", "second_moment"}
    assert agreed["adapter"] == agreed["momentum"] != agreed["second_moment"]
    assert all(other == agreed for other, _ in found)
    for _, error in found:
        assert error is not None and error[0] == "RunError"
        assert "ranks hold different vectors momentum" in error[1]


def lanes_of(world: World) -> list[float]:
    """Sums over every lane of two neighbours, asked for by all ranks in the same order."""
    sums = []
    for first in range(world.size - 1):
        lane = world.lane(first, 2)
        if 0 <= lane.index < 2:
            total = torch.tensor([float(world.rank)])
            dist.all_reduce(total, group=lane.summer.group)
            sums.append(float(total))
    return sums


def sum_over_lanes() -> list[float]:
    """Lanes made twice: the second time their groups are there already."""
    with joined() as world:
        first = lanes_of(world)
        assert lanes_of(world) == first
        return first


def test_lanes_are_groups_of_neighbours(pool: Any) -> None:
    assert pool.run(4, sum_over_lanes) == [[1.0], [1.0, 3.0], [3.0, 5.0], [5.0]]
