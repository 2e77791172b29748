"""A batch of 16 rows split over a lane of four ranks: each member's step beside the whole step, and what a round gains.

One process takes the part of each member in turn, through :class:`ClientTrainer` with a lane whose sums are left out:
the all-reduce of an adapter (13.6 M numbers at 8B) is the only thing that the projection does not hold.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from statistics import mean, median

import torch

from fedsim.base.planner import Plan, plan_round
from fedsim.config import LocalConfig
from fedsim.data.chat import TokenRow
from fedsim.parallel.sums import Summer
from fedsim.parallel.world import Lane
from fedsim.study.bench_rows import Correctness, Row, Target
from fedsim.train.objectives import SftObjective
from tools.bench.gradients import of_trainer
from tools.bench.lengths import training_rows
from tools.bench.local_step import CLIENT_STEPS, STEPS, Client
from tools.bench.measure import percentiles
from tools.bench.stage import PAPER_LORA, Bench
from tools.bench.stepwise import runs_in_turns

WIDTH = 4
CLIENTS = 5
MICRO = LocalConfig().micro_batch_size


class WideLane:
    """The stage."""

    name = "wide_lane"

    def check(self, bench: Bench) -> list[Correctness]:
        """The members' gradients of one batch add up to the whole batch's."""
        lane = _Lane(bench)
        batch = lane.batches[0]
        whole = lane.gradient(batch, 0, 1)
        parts = sum((lane.gradient(batch, i, WIDTH) for i in range(WIDTH)), start=torch.zeros_like(whole))
        limit = 1e-5 if bench.dtype == torch.float32 else 1e-2
        error = float((parts - whole).norm() / whole.norm())
        return [Correctness("sum of the members' gradients, ‖sum − whole‖ / ‖whole‖", error, limit)]

    def time(self, bench: Bench) -> list[Row]:
        """The whole step and each member's, in turns."""
        lane = _Lane(bench)
        runs: dict[str, Callable[[int, Callable[[], None]], object]] = {"whole": partial(lane.run, 0, 1)}
        runs |= {f"member {i}": partial(lane.run, i, WIDTH) for i in range(WIDTH)}
        times = runs_in_turns(runs, bench.device, -(-bench.repeats // (STEPS - 1)), bench.budget_s)
        whole = times["whole"].steps
        members = [times[f"member {i}"].steps for i in range(WIDTH)]
        slowest = [max(step) for step in zip(*members, strict=True)]
        busy = sum(map(sum, members)) / (WIDTH * sum(slowest))
        share = median(slowest) / median(whole)
        plan = projected(lane.tokens_of_clients(), share)
        one = mean(lane.tokens_of_clients())
        shapes = {
            "rows": 16,
            "lane": WIDTH,
            "tokens_mean": mean(len(row) for batch in lane.batches for row in batch),
            "lora_r": PAPER_LORA.r,
            "model": bench.size.name,
        }
        return [
            Row(
                self.name,
                f"a member's step of 4 rows in a lane of {WIDTH}, the slowest member of each step",
                bench.dtype_name,
                shapes,
                seconds=percentiles(slowest),
                repeats=len(slowest),
                peer="fedsim, step of 16 rows on one rank",
                peer_seconds=percentiles(whole),
                figures={
                    "share_of_16_rows": share,
                    "mean_member_share": median(s for member in members for s in member) / median(whole),
                },
                target=Target("share_of_16_rows", 0.33, at_most=True),
                note="without the all-reduce of the adapter's gradient",
            ),
            Row(
                self.name,
                f"{CLIENTS} clients on {WIDTH} ranks, projected makespan",
                bench.dtype_name,
                shapes,
                figures={"client_times": plan.makespan_s / one, "idle": _idle(plan, busy)},
                target=Target("client_times", 1.35, at_most=True),
                note="the planner's placement, with the measured share for wide lanes; clients' tokens as drawn",
            ),
            Row(
                self.name,
                f"{CLIENTS} clients on {WIDTH} ranks, projected idle share",
                bench.dtype_name,
                shapes,
                figures={"idle": _idle(plan, busy)},
                target=Target("idle", 0.08, at_most=True),
                note="waiting for slower clients, and for the slowest member of each wide step",
            ),
        ]


class _Lane:
    """A client and its rows, to be trained as any member of a lane."""

    def __init__(self, bench: Bench) -> None:
        self.device = bench.device
        self.client = Client(bench)
        self.rows = training_rows(16 * CLIENT_STEPS * CLIENTS, bench.size.vocab_size)
        self.batches = [self.rows[i : i + 16] for i in range(0, len(self.rows), 16)]

    def run(self, index: int, size: int, turn: int, mark: Callable[[], None]) -> None:
        """Steps of one member, without the others' gradients."""
        self.client.run(self.rows, turn, mark, self._lane(index, size))

    def gradient(self, batch: Sequence[TokenRow], index: int, size: int) -> torch.Tensor:
        """The member's gradient of a batch, before clipping."""
        self.client.adapter.load(self.client.start)
        return of_trainer(self.client.trainer.trainer, batch, SftObjective(), self._lane(index, size))

    def tokens_of_clients(self) -> list[int]:
        """Tokens of a round's steps, by client."""
        return [
            sum(len(row) for batch in self.batches[c * CLIENT_STEPS : (c + 1) * CLIENT_STEPS] for row in batch)
            for c in range(CLIENTS)
        ]

    def _lane(self, index: int, size: int) -> Lane:
        return Lane(index, size, Summer(None, exact=False, device=self.device))


def projected(tokens: Sequence[int], share: float) -> Plan:
    """The planner's plan, its wide clients as long as measured: ``share`` of their time on one rank."""
    plan = plan_round(dict(enumerate(tokens)), [1.0] * WIDTH, 16 // MICRO, wide_lanes=True)
    free = [0.0] * WIDTH
    work = 0.0
    for job in plan.jobs:
        start = max(free[rank] for rank in job.ranks)
        length = tokens[job.client] * (1.0 if job.width == 1 else share * WIDTH / job.width)
        work += length * job.width
        for rank in job.ranks:
            free[rank] = start + length
    return Plan(plan.jobs, max(free), 1.0 - work / (WIDTH * max(free)))


def _idle(plan: Plan, busy: float) -> float:
    """Idle share of all rank-seconds; in wide lanes the members are ``busy`` for that share alone."""
    single = sum(job.end_s - job.start_s for job in plan.jobs if job.width == 1)
    whole = (1.0 - plan.idle_share) * WIDTH * plan.makespan_s
    return 1.0 - (single + (whole - single) * busy) / (WIDTH * plan.makespan_s)


STAGE = WideLane()
