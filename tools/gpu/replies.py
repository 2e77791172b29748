"""Generated tokens against a reference that reads them: greedy and drawn ones, kept keys and values, graphs."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import numpy as np
import torch

from fedsim.generate.graph import Capture, capture_cuda
from tools.bench.generation import Called, Conversations, inner
from tools.bench.measure import deterministic
from tools.bench.stage import Bench
from tools.gpu.parity import Sides, attending, backends, worst
from tools.gpu.report import Report

TURNS = 3
SLOTS = 3  # fewer than rows: slots change their rows
TEMPERATURES = {"greedy": 0.0, "drawn": 1.0}


def check_replies(report: Report, sides: Sides, bench: Bench, num_rows: int, of: str) -> None:
    """Three turns of each row by every backend: step by step, and in replayed graphs where there is a GPU.

    Each token is held against what the reference makes of all that stands before it, so that one close call does not
    make all later tokens count as wrong.
    """
    capture: Capture = capture_cuda if bench.cuda else Called
    graphs = "CUDA graphs" if bench.cuda else "steps in a graph's stead"
    for name in backends(sides):
        if name == "eager":
            continue  # CUDA's graphs are taken over the three that a run may choose
        for how, temperature in TEMPERATURES.items():
            what = f"{of}, {name}, {how}"
            with report.guarding(f"{what}: breaks off"), attending(sides, name), deterministic(True):
                sides.reset()
                rows = Conversations(bench, num_rows, TURNS)
                made = rows.ours(inner(sides.model), SLOTS, temperature, None)
                report.add(f"{what}: {TURNS} turns, {_measure(temperature)}", *_judged(sides, rows, made, temperature))
                kept = sum(num_kept > 0 for num_kept, _, _ in rows.turns) / (num_rows * (TURNS - 1))
                report.add(f"{what}: later turns that computed again what the cache held, share", 1 - kept, 0.0)
            for algorithms in (True, False):
                mode = "deterministic algorithms" if algorithms else "any algorithms"
                with report.guarding(f"{what}: {graphs}, {mode}: breaks off"), attending(sides, name):
                    with deterministic(algorithms):
                        eager = rows.ours(inner(sides.model), SLOTS, temperature, Called)
                        replayed = rows.ours(inner(sides.model), SLOTS, temperature, capture)
                    moved = sum(a != b for a, b in zip(replayed, eager, strict=True)) / num_rows
                    report.add(f"{what}: {graphs}, {mode}: rows with another token than the same steps", moved, 0.0)


def _measure(temperature: float) -> str:
    if temperature == 0:
        return "log-probability below the reference's best token, max"
    return "distance of the drawn number from its token's interval, max"


def _judged(
    sides: Sides, rows: Conversations, made: Sequence[Sequence[list[int]]], temperature: float
) -> tuple[float, float]:
    """The worst token's distance from what the reference allows, and the largest that passes."""
    errors = [_row_error(sides, rows, i, turns, temperature) for i, turns in enumerate(made)]
    allowed = sides.tolerances
    return worst(errors), allowed.probability if temperature else allowed.gap


@torch.no_grad()
def _row_error(sides: Sides, rows: Conversations, row: int, turns: Sequence[list[int]], temperature: float) -> float:
    """One row, all of whose turns the reference reads at once."""
    asks = [[], *(asks[row] for asks in rows.asks)]
    whole, uniforms = list(rows.prompts[row]), []
    places: list[int] = []
    for turn, ids in enumerate(turns):
        whole += asks[turn]
        places += range(len(whole) - 1, len(whole) - 1 + len(ids))
        limit = rows.replies[turn][row]
        uniforms.append(np.random.Generator(np.random.Philox(key=row + turn)).random(limit)[: len(ids)])
        whole += ids
    logits = sides.reference.logits(whole)[places].double()
    tokens = torch.tensor(list(chain.from_iterable(turns)), device=logits.device)[:, None]
    if temperature == 0:
        logprobs = logits.log_softmax(-1)
        return worst((logprobs.amax(-1) - logprobs.gather(1, tokens)[:, 0]).tolist())
    after = (logits / temperature).softmax(-1).cumsum(-1)
    high, drawn = after.gather(1, tokens)[:, 0], torch.from_numpy(np.concatenate(uniforms)).to(logits.device)
    low = torch.where(tokens[:, 0] > 0, after.gather(1, (tokens - 1).clamp(min=0))[:, 0], 0.0)
    return worst(torch.maximum(low - drawn, drawn - high).clamp(min=0).tolist())
