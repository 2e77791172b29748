"""Plan of a run in words and tables, printed by ``fedsim run --check`` before it computes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from fedsim.base.artefacts import file_digest
from fedsim.base.planner import Plan, plan_round
from fedsim.base.tables import Table, byte_size
from fedsim.config import Config
from fedsim.config.measuring import is_unrated
from fedsim.data.prepared import PreparedData
from fedsim.data.usable import Tally
from fedsim.evaluate.sources import known_file
from fedsim.evaluate.suite import Suite
from fedsim.federation.algorithms import build_algorithm
from fedsim.federation.attacks import build_attacks
from fedsim.model.load import check_model_dir, load_chat
from fedsim.record.folders import DiskRoom
from fedsim.run.checks import Preflight
from fedsim.run.fitting import Fit
from fedsim.run.local_rows import local_rows
from fedsim.run.needs import round_work
from fedsim.run.preparation import Inputs, tunes_guard
from fedsim.safety.alignment import fills


def plan_text(config: Config, inputs: Inputs, found: Preflight, num_ranks: int) -> str:
    """The whole plan, ready to print."""
    files = {name: _input(path) for name, path in inputs.files.items()}
    memory = memory_table(found).plain()
    parts = [
        _lines("Inputs", files),
        _lines("Work", work(config, inputs.data, inputs.suite)),
        _lines("Rows to train on", rows(config, inputs.data)),
        _lines("Lanes", lanes(config, num_ranks)),
        _lines("Models", models(found)),
        f"Memory of each process, at the longest rows that the configuration allows\n{memory}",
    ]

    # Sections that only runs on a GPU, or too large ones, have.
    if found.pass_tokens:
        parts.append(_lines("Most tokens of a training pass, by the GPU's memory", passes(found)))
    if any(fit != Fit() for fit in found.by_gpu.values()):
        parts.append(_lines("What to set for a GPU of", gpus(found)))
    parts.append(_lines("Disk", disk(found.room)))
    parts += [f"Warning: {warning}" for warning in found.warnings()]
    return "\n\n".join(parts)


def work(config: Config, data: PreparedData, suite: Suite) -> dict[str, str]:
    """Amounts of work of each stage."""
    federation, local, guard, cai = config.federation, config.local, config.guard, config.cai
    num_rows = sum(map(len, data.shards))
    facts = {}

    # Stages before the first round.
    if guard.is_model and guard.tune_epochs > 0:
        num_guard_rows = len(data.guard_rows)
        facts["guard fine-tuning"] = f"{guard.tune_epochs:g} epochs of {num_guard_rows:,} rows"
    if guard.kind != "none":
        facts["filter"] = f"{num_rows:,} rows by {guard.kind}, unsafe ones: {guard.action}"
    if cai.is_on:
        facts["CAI conversations"] = f"{len(data.cai_rows):,} rows of three turns"

    # Rounds.
    num_clients, steps = round_work(config)
    num_trained = federation.num_rounds * num_clients * steps * local.batch_size
    facts["local training"] = (
        f"{federation.num_rounds} rounds of {num_clients} client(s), {steps} steps of "
        f"{local.batch_size} rows each: {num_trained:,} rows in all"
    )
    facts["failures"] = config.failures.words()
    if config.attacks:
        attacks = build_attacks(config.attacks, federation.num_clients, config.seed)
        facts["attacks"] = "; ".join(attack.words(federation.num_clients) for attack in attacks)
    if cai.is_on:
        stages = sum(cai.is_due(i, federation.num_rounds) for i in range(federation.num_rounds))
        amount = "an epoch" if cai.iterations == -1 else f"{cai.iterations} iterations"
        facts["CAI"] = f"{stages} x {amount} of {cai.batch_size} rows, SFT and DPO"

    # Evaluations: of the pretrained model, and before and after CAI in rounds that have it.
    every, rounds = config.eval.every, federation.num_rounds
    measured = {rounds}
    if every:
        measured.update(range(every, rounds + 1, every))
    points = 1
    for number in measured:
        points += 2 if cai.is_due(number - 1, rounds) else 1
    items = ", ".join(f"{count:,} {name}" for name, count in suite.counts().items()) or "nothing"
    facts["evaluation"] = f"{points} times {items}"
    if is_unrated(config.eval.mt_bench, judged=config.judge.is_on):
        facts["MT-Bench"] = "answers are written and not rated, as judge.kind=none; set judge.* for scores"
    return facts


def rows(config: Config, data: PreparedData) -> dict[str, str]:
    """Counts of usable rows, before the filter and before CAI's conversations are written."""
    chat = load_chat(check_model_dir(config.model.path, "model.path"), "model.path")
    algorithm = build_algorithm(config.federation, config.server_optimizer)
    participation = algorithm.participation(config.federation, config.seed)
    found = {"clients": local_rows(config, participation, chat, data.shards).words(config)}
    if tunes_guard(config):
        found["guard fine-tuning"] = data.guard_tally.words("guard rows")
    if config.cai.is_on:
        limit = config.cai.max_length
        reasons: list[str | None] = []
        for row in data.cai_rows:
            reasons.append("no_targets" if fills(chat, row.prompt, limit) else None)
        tally = Tally.of(reasons)
        found["CAI"] = tally.words("CAI rows", max_length=f"cai.max_length={limit}")
    return found


def lanes(config: Config, num_ranks: int) -> dict[str, str]:
    """Placement of a round's clients if all had equally many tokens."""
    # One token a client and one second a token: times are in client times.
    num_micro_batches, wide_lanes = config.local.num_micro_batches, config.parallel.wide_lanes
    equal = dict.fromkeys(range(round_work(config)[0]), 1)
    plan: Plan = plan_round(equal, [1.0] * num_ranks, num_micro_batches, wide_lanes=wide_lanes)

    # Clients on lanes of one process, and of several.
    widths = [job.width for job in plan.jobs if job.width > 1]
    single = len(plan.jobs) - len(widths)
    clients = f"{single} on one process each"
    if widths:
        sizes = " and ".join(str(width) for width in sorted(set(widths)))
        clients += f", {len(widths)} shared by {sizes} processes"
    idle = f"{100 * plan.idle_share:.1f} % idle"
    return {
        "processes": str(num_ranks),
        "clients of a round": clients,
        "a round takes": f"{plan.makespan_s:.3g} client times, {idle}, if all are equal",
    }


def models(found: Preflight) -> dict[str, str]:
    """Size of each model and its adapter, and the attention backend that it gets."""
    lines = {}
    for role, shape in found.shapes.items():
        dtype = str(shape.dtype).removeprefix("torch.")
        lines[role] = (
            f"{shape.architecture}, {shape.num_parameters:,} weights in {dtype}, adapter of "
            f"{shape.adapter_size:,} numbers, attention: {shape.attention.words}"
        )
    return lines


def memory_table(found: Preflight) -> Table:
    """Memory of each stage, as a share of the free memory of the process with least."""
    least = min(found.free_bytes)
    rows = []
    for need in found.needs:
        share = f"{100 * need.num_bytes / least:.3g} %"
        rows.append([need.stage, byte_size(need.num_bytes), share, need.key or "nothing"])
    return Table(["stage", "at most", f"of {byte_size(least)} free", "lower it with"], rows)


def passes(found: Preflight) -> dict[str, str]:
    """Tokens that may share a forward and backward pass, by stage."""
    return {stage: f"{tokens:,}" for stage, tokens in found.pass_tokens.items()}


def gpus(found: Preflight) -> dict[str, str]:
    """Keys to change for each common size of a GPU, at the longest rows that are allowed."""
    return {size: fit.words() for size, fit in found.by_gpu.items()}


def disk(room: DiskRoom) -> dict[str, str]:
    """Disk space that checkpoints, control variates and adapters take, and that is free."""
    needed = f"at most {byte_size(room.needed)}"
    if room.there:
        needed += f", {byte_size(room.there)} of it there already"
    return {
        "checkpoints and client state": needed,
        "free": f"{byte_size(room.free)} at {room.folder}",
    }


def _input(path: Path) -> str:
    text = f"{path}, {byte_size(path.stat().st_size)}"
    known = known_file(file_digest(path))
    if known:
        text += f", the tested file of {known}"
    return text


def _lines(title: str, facts: Mapping[str, str]) -> str:
    width = max(map(len, facts), default=0)
    lines = [title]
    for name, text in facts.items():
        lines.append(f"  {name:<{width}}  {text}")
    return "\n".join(lines)
