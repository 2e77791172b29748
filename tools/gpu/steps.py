"""Single steps at 8B under torch's profiler, beside what the rehearsal on a fake device counted for them."""

from __future__ import annotations

import gzip
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any, Final

import torch
from torch.autograd import DeviceType

from fedsim.attention.choice import choose
from fedsim.base.tables import Table
from fedsim.fused.ops import why_plain
from fedsim.generate.decode import Decoder, Request, _Row
from fedsim.generate.engine import CUDA_BLOCK
from fedsim.generate.graph import Capture, Graphs, capture_cuda
from tools.bench.generation import Called
from tools.bench.lengths import random_ids
from tools.bench.measure import seconds_of
from tools.bench.models import GPU, ModelSize
from tools.gpu.report import Report, Setting
from tools.rehearsal.phases import CONTEXT, LAYERS, LORA, PHASES, Model, steps

GIB: Final = 1 << 30
COUNTED: Final = Path(__file__).resolve().parents[1] / "rehearsal" / "results" / "phases.json"
TIMED: Final = 3
THIN: Final = ModelSize(
    "thin",
    {**GPU.config, "vocab_size": 2048, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4,
     "num_key_value_heads": 2},
)  # fmt: skip
"""Of a dry run: Llama-3.1-8B's configuration with narrow layers, and more tokens than the embedded tokenizer has."""

HEAD: Final = ("step", "ms", "rehearsal", "kernels", "rehearsal", "kernels' ms", "busy", "peak GiB", "rehearsal")
Prepared = Callable[[], Any]


def run(setting: Setting, report: Report) -> None:
    """SFT, DPO, prefill and decoding, eager and replayed."""
    size, num_layers = (THIN, 2) if setting.dry else (GPU, LAYERS)
    config = size.llama()
    attention = choose("auto", config, torch.bfloat16, setting.device)
    report.figure("attention", attention.words)
    report.figure("why layers stay plain", why_plain(setting.device) if setting.cuda else "a CPU")
    model = Model(num_layers, LORA, setting.device, size)
    model.take(attention.name)
    counted = json.loads(COUNTED.read_text(encoding="utf-8"))["phases"]
    gpu = next((name for name in ("A100", "H200") if name in _device_name(setting)), "")
    lines = []
    for name in ("SFT step", "DPO step", "prefill"):
        with report.guarding(f"{name}: breaks off"):
            phase = replace(PHASES[name], backend=attention.name)
            found = _measured(setting, name, lambda phase=phase: steps(phase, model))  # type: ignore[misc]
            lines.append(_line(report, name, found, _reference(counted, name, attention.name), gpu))
    for num_rows in (64, 128):
        for replayed in (False, True):
            name = f"decode, {num_rows} rows{', replayed' if replayed else ''}"
            with report.guarding(f"{name}: breaks off"):
                found = _measured(
                    setting,
                    name,
                    lambda rows=num_rows, on=replayed: _decoding(model, setting, rows, on),  # type: ignore[misc]
                    parts=CUDA_BLOCK,
                )
                reference = _reference(counted, f"decode, {num_rows} rows", attention.name)
                lines.append(_line(report, name, found, reference, gpu))
    text = Table(HEAD, lines).plain()
    print(text, flush=True)
    setting.kept("steps.txt").write_text(text + "\n", encoding="utf-8")
    report.add("steps that are missing, of 7", 7 - len(lines), 0.0)


def _device_name(setting: Setting) -> str:
    return torch.cuda.get_device_name(setting.device) if setting.cuda else "CPU"


def _reference(counted: dict[str, Any], name: str, attention: str) -> dict[str, Any]:
    """The rehearsal's figures of a step, by the same attention where it has counted that."""
    found: dict[str, Any] = counted.get(name if attention == "varlen" else f"{name}, {attention}", counted[name])
    return found


def _measured(setting: Setting, name: str, prepare: Callable[[], Any], parts: int = 1) -> dict[str, Any]:
    """Seconds, peak memory and kernels of a step.

    Args:
        prepare: gives a context with (anything, what runs the step).
        parts: steps of one run.
    """
    device, times = setting.device, []
    for _ in range(1 if setting.dry else 1 + TIMED):
        with prepare() as (_, step):
            if setting.cuda:
                torch.cuda.reset_peak_memory_stats(device)
            times.append(seconds_of(step, device) / parts)
    peak = torch.cuda.max_memory_allocated(device) / GIB if setting.cuda else None
    activities = [torch.profiler.ProfilerActivity.CPU]
    if setting.cuda:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with prepare() as (_, step), torch.profiler.profile(activities=activities) as profiler:
        seconds_of(step, device)
    found = _kernels(profiler, setting.cuda, parts)
    _keep_trace(setting, name, profiler)
    return {"first_ms": 1e3 * times[0], "ms": 1e3 * median(times[1:] or times), "peak_gib": peak, **found}


def _kernels(profiler: Any, on_cuda: bool, parts: int) -> dict[str, Any]:
    """Kernels and their milliseconds; without a GPU the operators that call no other one."""
    count, total, by_name = 0, 0.0, Counter[str]()
    for event in profiler.events():
        is_kernel = event.device_type == DeviceType.CUDA and not event.name.startswith(("Memcpy", "Memset"))
        if is_kernel if on_cuda else not event.cpu_children:
            count += 1
            ms = event.time_range.elapsed_us() / 1e3
            total += ms
            by_name[event.name[:90]] += ms
    top = {name: round(ms / parts, 3) for name, ms in by_name.most_common(12)}
    return {"kernels": count / parts, "kernels_ms": total / parts, "most_ms": top}


def _keep_trace(setting: Setting, name: str, profiler: Any) -> None:
    """The Chrome trace, compressed."""
    trace = setting.folder / "trace.json"
    profiler.export_chrome_trace(str(trace))
    slug = name.lower().replace(", ", "-").replace(" ", "-")
    with trace.open("rb") as source, gzip.open(setting.kept(f"trace-{slug}.json.gz"), "wb") as target:
        shutil.copyfileobj(source, target)
    trace.unlink()


def _line(report: Report, name: str, found: dict[str, Any], reference: dict[str, Any], gpu: str) -> list[str]:
    """A line of the table; all figures go to the report."""
    expected = reference["ms"].get(gpu)
    report.figure(name, {**found, "rehearsal": {part: reference[part] for part in ("kernels", "ms", "peak")}})
    return [
        name,
        f"{found['ms']:.1f}",
        "–" if expected is None else f"{expected:.1f}",
        f"{found['kernels']:,.0f}",
        f"{reference['kernels']:,.0f}",
        f"{found['kernels_ms']:.1f}",
        f"{found['kernels_ms'] / found['ms']:.0%}",
        "–" if found["peak_gib"] is None else f"{found['peak_gib']:.1f}",
        f"{reference['peak'] / GIB:.1f}",
    ]


@contextmanager
def _decoding(model: Model, setting: Setting, num_rows: int, replayed: bool) -> Iterator[tuple[None, Prepared]]:
    """A block of steps with 300 tokens and more in each slot, which a prefill has read.

    Args:
        replayed: from CUDA graphs, which are captured before; a dry run calls the steps in their stead.
    """
    capture: Capture = capture_cuda if setting.cuda else Called
    model.model.eval()
    decoder = Decoder(
        model.inner,
        num_rows,
        max_new_tokens=8 * CUDA_BLOCK,
        eos_ids=frozenset(),
        graphs=Graphs(capture) if replayed else None,
        block=CUDA_BLOCK,
    )
    context = 20 if setting.dry else CONTEXT
    prompts = [random_ids(context, model.vocabulary, "prompt", i) for i in range(num_rows)]
    decoder._rows = [_Row(i, Request(ids, i, 8 * CUDA_BLOCK, 1.0)) for i, ids in enumerate(prompts)]
    with torch.inference_mode():
        decoder._reserve(context + 8 * CUDA_BLOCK + 1)
        while decoder._num_active < num_rows:
            decoder._read_in()
        for _ in range(2 if replayed else 1):  # the first block runs and captures, the next ones replay
            decoder._decode()
            decoder.slots.lengths = [length + CUDA_BLOCK for length in decoder.slots.lengths]
        yield None, decoder._decode
    if decoder.graphs is not None and decoder.graphs.problem is not None:
        raise RuntimeError(decoder.graphs.problem)
