"""Memory over many rounds, which must not grow, and what --check says a run needs against what it took."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Any

import torch

from fedsim.config import load_config
from fedsim.parallel.world import process_world
from fedsim.record.checkpoint import Checkpoint
from fedsim.run.checks import preflight
from fedsim.run.needs import memory_needs
from fedsim.run.simulation import Simulation
from tools.gpu.demo import DEMO
from tools.gpu.launch import stand_ins
from tools.gpu.report import Report, Setting

MIB = 2**20
SETTLED = 5  # rounds after which buffers have their size
SMALL = [
    "local.steps=1", "local.batch_size=4", "local.micro_batch_size=2", "federation.num_clients=4",
    "federation.clients_per_round=2", "data.federated_rows=80", "data.guard_rows=24", "data.cai_rows=12",
    "guard.kind=none", "cai.iterations=1", "cai.batch_size=4", "cai.max_new_tokens=32", "eval.every=5", "eval.limit=4",
    "eval.max_new_tokens=16", "wandb.mode=off",
]  # fmt: skip
WORKSPACES = 128 * MIB  # of cuBLAS and its like, which the bound leaves out
RESIDENT = 16 * MIB  # what a CPU's allocator keeps of 45 rounds


class Watched(Simulation):
    """Notes the memory at the end of each round.

    Attributes:
        held: bytes, by round.
    """

    held: list[int]

    def _round(self, *given: Any) -> Checkpoint:
        after = super()._round(*given)
        gc.collect()
        self.held.append(in_use(self.world.device))
        return after


def in_use(device: torch.device) -> int:
    """Bytes of tensors on a GPU; on a CPU what the process holds of the RAM."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return torch.cuda.memory_allocated(device)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def run(setting: Setting, report: Report) -> None:
    """Fifty rounds of a small run."""
    note = "; ".join(stand_ins())
    num_rounds = 8 if setting.dry else 50
    places = ["name=memory", f"record.dir={setting.folder}", f"record.artefacts={setting.folder / 'artefacts'}"]
    config = load_config(DEMO, [*SMALL, *places, f"federation.num_rounds={num_rounds}"])
    device = "cuda" if setting.cuda else "cpu"
    with process_world(exact=True, threads=1, timeout_s=60, device=device) as world:
        if setting.cuda:
            torch.cuda.reset_peak_memory_stats(world.device)
        watched = Watched(config, world)
        watched.held = []
        watched.run()
        found = preflight(config, world)
        bound = max(need.num_bytes for need in memory_needs(config, found.shapes, world.size))
    grown = max(watched.held[SETTLED:]) - watched.held[SETTLED - 1]
    what, limit = ("tensors on the GPU", 1.0) if setting.cuda else ("resident memory", RESIDENT / MIB)
    report.add(
        f"{what} after rounds {SETTLED + 1} to {num_rounds} beyond round {SETTLED}'s, MiB", grown / MIB, limit, note
    )
    name = "peak of GPU memory beyond --check's bound, MiB"
    if not setting.cuda:
        report.leave_out(name, "only a GPU's allocator counts its peak")
        return
    peak = torch.cuda.max_memory_allocated(world.device)
    why = f"peak {peak / MIB:.0f} MiB, bound {bound / MIB:.0f} MiB; the tolerance is for libraries' workspaces"
    report.add(name, (peak - bound) / MIB, WORKSPACES / MIB, why)
