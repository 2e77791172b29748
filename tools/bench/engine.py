"""Engine overhead: what share of a demo round is spent outside the model, by cause, and when the first step is done.

A run is started as a user starts it (plain python, or torchrun with several processes). While a round is under way
every process looks at its own stack some 250 times a second (``SIGALRM``) and charges the time since the last look to
one of three kinds:

- model: forward and backward passes, sampling, optimizer steps, and the sums over clients and micro-batches;
- waiting: inside ``torch.distributed``, for the other ranks;
- engine: all the rest, by the function of fedsim that it happens in.

A signal that arrives inside a C call is handled when the call returns, in the frame that made it, so a long call is
charged in full. The share is engine ÷ (engine + model), over all processes; the strict share counts as the model's
work passes, optimizer steps and sampling alone, and what else is in ``MODEL`` as the engine's. On a GPU the stack says
nothing about what the device does: the figures are the CPU's.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from fedsim.base.tables import Table
from fedsim.study.bench_rows import Correctness, Row, Target
from tools.bench.stage import Bench, LeftOut, installed

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "configs" / "demo.yaml"
ROUNDS = 4  # the demo evaluates every fourth
INTERVAL_S = 0.004
Kind = Literal["model", "waiting", "engine"]

#: Where the innermost frame of fedsim (or of the folder named) decides. Paths are relative to the repository; a name
#: after "::" is a function of that file. What is not listed is engine.
MODEL = (
    "fedsim/attention/",
    "fedsim/model/logprobs.py",
    "fedsim/train/loop.py",
    "fedsim/train/objectives.py::sums",
    "fedsim/generate/decode.py",
    "fedsim/generate/graph.py",
    "fedsim/generate/sampling.py",
    "fedsim/attention/prefix.py",
    "fedsim/generate/score.py",
    "fedsim/attention/kv_cache.py",
    "fedsim/generate/slot_state.py",
    "fedsim/parallel/sums.py",
    "fedsim/run/aggregate.py",
    "fedsim/federation/proximal.py",
    "fedsim/federation/scaffold.py",
    "fedsim/federation/server_optimizers.py",
    "fedsim/federation/algorithms.py",
    "fedsim/kernels/",
    "kernels/",
)
#: Of these, what the strict share counts as engine: sums over ranks and clients, the server's step, the slots' upkeep.
LOOSE = (
    "fedsim/attention/kv_cache.py",
    "fedsim/generate/slot_state.py",
    "fedsim/parallel/",
    "fedsim/federation/",
    "fedsim/kernels/",
    "kernels/",
)
#: Library frames that are part of a forward pass, a backward pass or an optimizer step, whoever called them.
LIBRARIES = ("torch/nn/", "torch/autograd/", "torch/optim/", "transformers/models/llama/", "peft/tuners/")


@dataclass(frozen=True)
class Place:
    """Where a moment of a process belongs."""

    kind: Kind
    where: str


def place_of(frame: FrameType | None) -> Place:
    """The kind of work that a stack is doing, and the function of fedsim (or the library) that does it."""
    where = None
    while frame is not None:
        file = frame.f_code.co_filename
        if "/torch/distributed/" in file and where is None:
            return Place("waiting", _caller(frame))
        if where is None and any(part in file for part in LIBRARIES):
            return Place("model", _caller(frame))
        if (found := _in_repository(file)) is not None:
            name = f"{found}::{frame.f_code.co_name}"
            return Place("model" if name.startswith(MODEL) else "engine", name)
        frame = frame.f_back
    return Place("engine", "(no frame of fedsim)")


def _caller(frame: FrameType | None) -> str:
    """The innermost function of fedsim on a stack."""
    while frame is not None:
        if (found := _in_repository(frame.f_code.co_filename)) is not None:
            return f"{found}::{frame.f_code.co_name}"
        frame = frame.f_back
    return "(no frame of fedsim)"


def _in_repository(file: str) -> str | None:
    for folder in ("fedsim/", "kernels/"):
        if file.startswith(f"{ROOT}/{folder}"):
            return file[len(str(ROOT)) + 1 :]
    return None


class Sampler:
    """Charges wall-clock time to places, in this process's main thread, while :meth:`running`.

    Attributes:
        seconds: by place.
    """

    def __init__(self, interval_s: float = INTERVAL_S) -> None:
        self.interval_s = interval_s
        self.seconds: Counter[Place] = Counter()
        self._last = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Sample the block."""
        before = signal.signal(signal.SIGALRM, self._look)
        self._last = time.perf_counter()
        signal.setitimer(signal.ITIMER_REAL, self.interval_s, self.interval_s)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)

    def _look(self, _: int, frame: FrameType | None) -> None:
        now = time.perf_counter()
        self.seconds[place_of(frame)] += now - self._last  # type: ignore[assignment]
        self._last = time.perf_counter()  # the look itself is nobody's


def child(out: Path, began: float, arguments: Sequence[str]) -> None:
    """One process of the measured run: as ``launch/run.py``, with the clock and the sampler around it."""
    import torch

    from fedsim.config import load_config
    from fedsim.config.command_line import parse_command
    from fedsim.parallel.world import process_world
    from fedsim.record.metrics import read_rows
    from fedsim.run.simulation import Simulation

    marks: dict[str, float] = {"imported_s": time.time() - began}
    facts: dict[str, Any] = {}
    sampler = Sampler()

    class Measured(Simulation):
        def _assemble(self, *given: Any) -> Any:
            marks.setdefault("filtered_s", time.time() - began)
            federation = super()._assemble(*given)
            train = federation.cohorts.train
            base = federation.loaded.base
            facts.update(dtype=str(base.dtype).removeprefix("torch."), device=base.device.type)
            facts.update(threads=torch.get_num_threads())

            def noting(cohort: Any, round_idx: int, state: Any, cost: Any, on_step: Any) -> Any:
                marks.setdefault("first_round_s", time.time() - began)

                def step(done: int, total: int) -> None:
                    marks.setdefault("first_step_s", time.time() - began)
                    on_step(done, total)

                return train(cohort, round_idx, state, cost, step)

            setattr(federation.cohorts, "train", noting)  # noqa: B010 (a method, as far as types know)
            return federation

        def _round(self, *given: Any) -> Any:
            started = time.perf_counter()
            with sampler.running():
                after = super()._round(*given)
            marks["rounds_s"] = marks.get("rounds_s", 0.0) + time.perf_counter() - started
            return after

    command = parse_command(arguments)
    config = load_config(command.file, command.overrides)
    parallel = config.parallel
    with process_world(
        exact=parallel.exact, threads=parallel.threads, timeout_s=parallel.timeout_s, device=parallel.device
    ) as world:
        simulation = Measured(config, world)
        simulation.run()
        prepared = next((row for row in read_rows(simulation.record.metrics_file) if row["stage"] == "prepare"), {})
        facts["before"] = {"imports_s": marks["imported_s"]} | {
            name.removeprefix("time/"): seconds for name, seconds in prepared.items() if name.startswith("time/")
        }
        places = [[place.kind, place.where, spent] for place, spent in sampler.seconds.most_common()]
        every = world.ranks.gather({"marks": marks, "places": places})
        if world.ranks.is_main:
            out.write_text(json.dumps({"ranks": every, "num_rounds": config.federation.num_rounds, **facts}))


def measure(num_ranks: int, arguments: Sequence[str]) -> dict[str, Any]:
    """Start a run, wait for it, and return what its processes measured.

    Args:
        arguments: as of ``launch/run.py``.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "engine.json"
        launcher = [sys.executable]
        if num_ranks > 1:
            launcher += ["-m", "torch.distributed.run", f"--nproc_per_node={num_ranks}", "--standalone"]
        began = time.time()
        command = [*launcher, __file__, str(out), str(began), *arguments]
        found = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
        if found.returncode != 0:
            raise RuntimeError(f"{' '.join(command)} failed:\n{found.stderr[-4000:]}")
        return {"total_s": time.time() - began, **json.loads(out.read_text())}


def shares(found: Mapping[str, Any]) -> dict[str, float]:
    """Seconds by kind over all processes, and the engine's shares of the time that is not waiting."""
    seconds: Counter[str] = Counter()
    loose = 0.0
    for rank in found["ranks"]:
        for kind, where, spent in rank["places"]:
            seconds[kind] += spent
            loose += spent if kind == "model" and where.startswith(LOOSE) else 0.0
    busy = seconds["engine"] + seconds["model"]
    return {
        **{f"{kind}_s": seconds[kind] for kind in ("model", "engine", "waiting")},
        "share": seconds["engine"] / busy,
        "strict_share": (seconds["engine"] + loose) / busy,
    }


def causes(found: Mapping[str, Any], kind: Kind) -> Counter[str]:
    """Seconds by function, over all processes."""
    seconds: Counter[str] = Counter()
    for rank in found["ranks"]:
        for its_kind, where, spent in rank["places"]:
            if its_kind == kind:
                seconds[where] += spent
    return seconds


def page(found: Mapping[str, Any], num_ranks: int, most: int = 12) -> str:
    """Everything that is printed."""
    whole, marks = shares(found), found["ranks"][0]["marks"]
    busy = whole["engine_s"] + whole["model_s"]
    lines = [
        f"{num_ranks} process(es), {found['num_rounds']} rounds: engine {100 * whole['share']:.2f} % "
        f"(strictly {100 * whole['strict_share']:.2f} %) of "
        f"{busy:.2f} s, and {whole['waiting_s']:.2f} s waiting for other ranks",
        "  ".join(f"{name} {value:.2f}" for name, value in marks.items()) + f"  total_s {found['total_s']:.2f}",
    ]
    for kind in ("engine", "model"):
        rows = [[w, f"{s:.3f}", f"{100 * s / busy:.2f} %"] for w, s in causes(found, kind).most_common(most)]
        lines += ["", Table([kind, "seconds", "share"], rows).plain()]
    return "\n".join(lines)


class EngineStage:
    """See the module."""

    name = "engine"

    def check(self, bench: Bench) -> list[Correctness]:
        """Nothing of the cold run's rounds is charged to nobody; :meth:`time` takes up its artefacts and its row."""
        if not installed("datasets"):
            raise LeftOut("the demo reads its rows with datasets, which is not installed")
        self.folder = tempfile.TemporaryDirectory()
        self.cold = self._measure(bench, "cold", 1)
        wall = self.cold["ranks"][0]["marks"]["rounds_s"]
        charged = math.fsum(spent for _, _, spent in self.cold["ranks"][0]["places"])
        return [
            Correctness("seconds charged to a place against the clock, |Σ / clock − 1|", abs(charged / wall - 1), 0.03)
        ]

    def time(self, bench: Bench) -> list[Row]:
        """The demo's first four rounds, of which the last is evaluated: cold, then with the artefacts of the first."""
        began = time.perf_counter()
        found = rows_of(self.cold, 1, "cold")
        for num_ranks in (1, 4):
            if time.perf_counter() - began > bench.budget_s:
                bench.say(f"  the warm run of {num_ranks} process(es) is left out: the stage's seconds are over")
                continue
            found += rows_of(self._measure(bench, "warm", num_ranks), num_ranks, "warm")
        self.folder.cleanup()
        return found

    def _measure(self, bench: Bench, what: str, num_ranks: int) -> dict[str, Any]:
        arguments = [*places(Path(self.folder.name), f"{what}-{num_ranks}"), f"federation.num_rounds={ROUNDS}"]
        found = measure(num_ranks, arguments)
        bench.say(page(found, num_ranks))
        return found


def rows_of(found: Mapping[str, Any], num_ranks: int, what: str) -> list[Row]:
    """A measured run as rows of the benchmark: the engine's share, and when the first step was done."""
    whole, marks, cuda = shares(found), found["ranks"][0]["marks"], found["device"] == "cuda"
    share = Row(
        stage="engine",
        name=f"demo, {num_ranks} process(es), {what} artefacts",
        dtype=found["dtype"],
        shapes={
            "rounds": found["num_rounds"],
            "ranks": num_ranks,
            "threads": found["threads"],
            "device": found["device"],
        },
        figures={"engine_share": whole.pop("share"), **whole},
        target=Target("engine_share", 0.03 if cuda else 0.05, at_most=True),
        note="of the time that is not waiting for other ranks. engine_share counts as the model's work: passes, "
        "optimizer steps, sampling, the slots' upkeep, sums over clients and ranks, and the server's step; "
        "strict_share: passes, optimizer steps and sampling alone",
    )
    return [
        share,
        replace(
            share,
            name=f"{share.name}, first step",
            figures={"first_step_s": marks["first_step_s"], **found["before"]},
            target=Target("first_step_s", 60.0 if cuda else 15.0, at_most=True),
            note="from the command to the end of the first local step, and the seconds of what comes before it: the "
            "imports, data, the filter (a cold run fine-tunes the guard), the model, the pretrained model's evaluation "
            "and CAI's conversations",
        ),
    ]


def places(folder: Path, name: str) -> list[str]:
    """Arguments that keep a run of the demo inside a folder; its artefacts are shared."""
    own = [f"name={name}", f"record.dir={folder / 'runs'}", f"record.artefacts={folder / 'artefacts'}"]
    return [str(DEMO), "parallel.device=auto", *own]


STAGE = EngineStage()


if __name__ == "__main__":  # one process of a run that :func:`measure` has started
    child(Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3:])
