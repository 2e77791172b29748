"""Checks before training: every mistake that can be found without computing.

Each check is cheap (of weights only names and shapes are read; an architecture is tried with a
small random model), runs on every rank, and is made before the first expensive stage of every run;
``fedsim run --check`` makes them, prints the plan and stops. A check that finds a mistake does not
keep the others from being made.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

import torch

from fedsim.attention.choice import agreed
from fedsim.base.errors import ConfigError, FolderError, Gathered
from fedsim.base.planner import useful_ranks
from fedsim.base.tables import byte_size
from fedsim.config import Config
from fedsim.evaluate.judge_inputs import build_judge, check_judge
from fedsim.evaluate.phrases import users_rules
from fedsim.extend import build
from fedsim.federation.algorithms import build_algorithm
from fedsim.federation.attacks import build_attacks
from fedsim.model.load import check_model_dir, check_tokenizer, load_chat, read_config
from fedsim.model.shape import ModelShape, model_shape
from fedsim.model.trial import try_model
from fedsim.parallel.device import NCCL
from fedsim.parallel.world import World
from fedsim.record.folders import DiskRoom, check_disk, check_folder
from fedsim.run.benchmarks import users_benchmarks
from fedsim.run.fitting import Fit, fits_by_gpu, fitting, with_effective_keys
from fedsim.run.memory import Need, free_memory, usable_memory
from fedsim.run.needs import GENERATION, memory_needs, round_work, tokens_of_passes
from fedsim.safety.cai_stage import constitution_file
from fedsim.safety.constitution import load_constitution
from fedsim.safety.guard_format import GuardFormat
from fedsim.train.zero_config import zero_settings

SHARED_MEMORY: Final = 2**30
"""Bytes of /dev/shm below which NCCL is warned of; Docker gives a container 64 MiB."""

RESERVE: Final = 2 << 30
"""Bytes that are never counted as spare: CUDA graphs, fragments, and libraries' workspaces."""


@dataclass(frozen=True)
class Preflight:
    """Findings of the checks.

    Attributes:
        shapes: sizes of the models in use, by role ("model", "guard", "judge").
        needs: memory of each stage on one rank, an upper bound.
        free_bytes: memory that each rank can have.
        room: space of the run directory.
        untried: roles of the models whose architecture only loading shows to fit
            (:mod:`fedsim.model.trial`).
        fit: what makes every stage fit into the memory of the rank with least.
        by_gpu: the same for common sizes of GPUs.
        shared_memory: a warning about /dev/shm; "" where there is none.
        pass_tokens: most tokens of a training pass, by stage, where memory decides
            (:func:`tokens_of_passes`).
    """

    shapes: Mapping[str, ModelShape]
    needs: Sequence[Need]
    free_bytes: Sequence[int]
    room: DiskRoom
    untried: tuple[str, ...] = ()
    fit: Fit = field(default_factory=Fit)
    by_gpu: Mapping[str, Fit] = field(default_factory=dict)
    shared_memory: str = ""
    pass_tokens: Mapping[str, int] = field(default_factory=dict)

    @property
    def spare_bytes(self) -> int:
        """Bytes beyond all stages' upper bounds but generation's, on the rank with least memory."""
        most = max(need.num_bytes for need in self.needs if need.stage != GENERATION)
        return max(0, min(self.free_bytes) - most - RESERVE)

    def warnings(self) -> list[str]:
        """One line for each thing that may go wrong.

        Models that could not be tried, and stages whose upper bound is more than the rank with
        least memory has.
        """
        lines = []
        for role in self.untried:
            lines.append(
                f"{role}.path: no small {self.shapes[role].architecture} could be made to try it; "
                "a run loads the model once before its first stage"
            )

        # Stages that may run out of memory, and what would make them fit.
        least = min(self.free_bytes)
        too_large = [need for need in self.needs if need.num_bytes > least]
        for need in too_large:
            size = byte_size(need.num_bytes)
            line = f"{need.stage} may not fit into {byte_size(least)} (at most {size})"
            lines.append(f"{line}; lower {need.key}" if need.key else line)
        if too_large and self.fit != Fit():
            lines.append(f"for {byte_size(least)}: {self.fit.words()}")

        if self.shared_memory:
            lines.append(self.shared_memory)
        return lines


def check_code(config: Config) -> None:
    """Load and build all user code that the configuration names, before anything is read.

    Raises:
        ConfigError: one of them cannot be loaded or built, or its options are wrong.
        Problems: several.
    """
    federation, guard, evaluation = config.federation, config.guard, config.eval
    mistakes = Gathered()

    def build_partition() -> None:
        sections = {"federation": federation}
        build("federation.partition", federation.partition, federation.partition_options, sections)

    def build_guard() -> None:
        build("guard.kind", guard.kind, guard.options, {"guard": guard, "seed": config.seed})

    mistakes.attempt(lambda: build_algorithm(federation, config.server_optimizer))
    mistakes.attempt(build_partition)
    mistakes.attempt(lambda: build_attacks(config.attacks, federation.num_clients, config.seed))
    mistakes.attempt(lambda: users_rules(evaluation.advbench_phrases, evaluation.advbench_options))
    mistakes.attempt(lambda: users_benchmarks(evaluation))
    mistakes.attempt(lambda: build_judge(config))
    if not guard.is_model:
        mistakes.attempt(build_guard)
    elif guard.options:
        mistakes.add(
            ConfigError(
                "guard.options: guard.kind=llama_guard takes none; it has keys of its own (guard.*)",
            )
        )
    mistakes.raise_all()


def models_in_use(config: Config) -> dict[str, str]:
    """Path of each model that the run loads, by role."""
    models = {"model": config.model.path}
    if config.guard.is_model or config.eval.guard_judge != "none":
        models["guard"] = config.guard.path
    if config.judge.kind == "local":
        models["judge"] = config.judge.path
    return models


def loaded_together(config: Config) -> list[list[str]]:
    """Roles of the models that are in memory at the same time.

    The guard filters before the model is loaded, and stays if it is to classify replies; a local
    judge is loaded for each evaluation.
    """
    roles = models_in_use(config)
    guard_stays = config.eval.guard_judge != "none"
    together = []
    if "guard" in roles and not guard_stays:
        together.append(["guard"])
    beside_model = ["model"]
    if guard_stays:
        beside_model.append("guard")
    if "judge" in roles:
        beside_model.append("judge")
    together.append(beside_model)
    return together


def preflight(config: Config, world: World) -> Preflight:
    """Check lanes, models, constitution, folders, disk and memory on every rank.

    Raises:
        ConfigError, DataError, ModelError: the one mistake, the same on every rank.
        Problems: several, those of the first rank that has any.
    """
    # Every rank checks for itself; all see the first rank's mistakes.
    by_rank = world.ranks.each(lambda: _check(config, world))
    for one in by_rank:
        one.mistakes.raise_all()
    found = by_rank[world.rank]
    room = found.room
    assert room is not None

    # Sizes of the models, with the attention that all ranks can take.
    shapes = {}
    for role, shape in found.shapes.items():
        choices = [one.shapes[role].attention for one in by_rank]
        shapes[role] = replace(shape, attention=agreed(choices))

    # Memory: weights must fit into the rank with least; passes are as large as the rest allows.
    free = [one.free_bytes for one in by_rank]
    least = free.index(min(free))
    on_gpu = world.device.type == "cuda"
    _check_weights(config, shapes, rank=least, free_bytes=free[least], on_gpu=on_gpu)
    usable = min(one.usable_bytes for one in by_rank)
    pass_tokens = tokens_of_passes(
        config,
        shapes,
        world.size,
        free_bytes=free[least],
        usable_bytes=usable,
    )
    needs = memory_needs(config, shapes, world.size, pass_tokens)
    shared_memory = ""
    if world.placement.backend == NCCL:
        shared_memory = shared_memory_warning()
    return Preflight(
        shapes,
        with_effective_keys(config, shapes, world.size, needs),
        free,
        room,
        tuple(found.untried),
        fitting(config, shapes, world.size, free[least]),
        fits_by_gpu(config, shapes, world.size),
        shared_memory,
        pass_tokens,
    )


def _check_weights(
    config: Config,
    shapes: Mapping[str, ModelShape],
    *,
    rank: int,
    free_bytes: int,
    on_gpu: bool,
) -> None:
    """Check that the weights of models that are loaded together fit into memory.

    Args:
        shapes: sizes of the models in use, by role.
        rank: the rank with least memory.
        free_bytes: its free memory.
        on_gpu: the memory is a GPU's.

    Raises:
        ConfigError: they do not fit.
    """
    paths = models_in_use(config)
    for roles in loaded_together(config):
        weights = sum(shapes[role].weight_bytes for role in roles)  # bytes
        if weights <= free_bytes:
            continue
        named = " and ".join(f"{role}.path={paths[role]!r}" for role in roles)
        whose = "its weights"
        if len(roles) > 1:
            whose = "their weights, which are loaded together,"
        dtype = str(shapes["model"].dtype).removeprefix("torch.")
        free_it = ""
        if on_gpu:
            free_it = "end other processes on its GPU or choose free GPUs with CUDA_VISIBLE_DEVICES, "
        raise ConfigError(
            f"{named}: {whose} take {byte_size(weights)} in {dtype}, and rank {rank} has "
            f"{byte_size(free_bytes)} free; {free_it}start fewer processes on this machine, set "
            "model.dtype=bfloat16, or use a smaller model"
        )


def shared_memory_warning(folder: str = "/dev/shm") -> str:
    """Return a warning if NCCL has too little shared memory, as in Docker; else ""."""
    try:
        found = os.statvfs(folder)
    except OSError:
        return f"{folder} is missing, which NCCL uses; start a container with --shm-size=8g"
    size = found.f_frsize * found.f_blocks
    if size >= SHARED_MEMORY:
        return ""
    return f"{folder} has {byte_size(size)}, which may be too little for NCCL; start a container with --shm-size=8g"


@dataclass
class _Checked:
    """One rank's findings: sizes of models, disk space, free memory in bytes, mistakes."""

    shapes: dict[str, ModelShape] = field(default_factory=dict)
    untried: list[str] = field(default_factory=list)
    room: DiskRoom | None = None
    free_bytes: int = 0
    usable_bytes: int = 0
    mistakes: Gathered = field(default_factory=Gathered)


def _check(config: Config, world: World) -> _Checked:
    """Make every check on this rank, also after one has failed."""
    record, guard = config.record, config.guard
    found = _Checked(
        free_bytes=free_memory(world.device, world.sharing),
        usable_bytes=usable_memory(world.device, world.sharing),
    )
    attempt = found.mistakes.attempt

    # Lanes and folders.
    artefacts = record.artefact_folder
    attempt(lambda: check_world_size(config, world.size))
    attempt(lambda: check_folder(config.folder, f"record.dir={record.dir!r}, name={config.name!r}"))
    attempt(lambda: check_folder(artefacts, f"record.artefacts={record.artefacts!r}"))

    # Models, and the files of CAI, DeepSpeed and the judge.
    for role, path in models_in_use(config).items():
        _check_model(config, role, path, world.device, found)
    if config.cai.is_on:
        attempt(lambda: load_constitution(constitution_file(config.cai.constitution)))
    if guard.is_model and guard.deepspeed:
        attempt(lambda: zero_settings(config, world.size))
    attempt(lambda: check_judge(config))

    # Disk space follows from the adapter's size, so that it comes after the model's check.
    has_folders = not any(isinstance(error, FolderError) for error in found.mistakes.errors)
    shape = found.shapes.get("model")
    if has_folders and shape is not None:
        adapter_size = shape.adapter_size
        found.room = attempt(lambda: check_disk(config, adapter_size, round_work(config)[0]))
    return found


def check_world_size(config: Config, num_ranks: int) -> None:
    """Check that every rank has a part in local training.

    Raises:
        ConfigError: there are more ranks than lanes can use.
    """
    num_micro_batches = config.local.num_micro_batches
    wide = config.parallel.wide_lanes
    num_clients, _ = round_work(config)
    most = useful_ranks(num_clients, num_micro_batches, wide_lanes=wide)
    if num_ranks <= most:
        return
    bound, fix = "parallel.wide_lanes=false", "set parallel.wide_lanes=true"
    if wide:
        bound, fix = f"{num_micro_batches} micro-batches a client", "lower local.micro_batch_size"
    raise ConfigError(
        f"{num_ranks} processes: must be <= {most}, the lanes that a round of {num_clients} "
        f"client(s) can use ({bound}); start fewer, {fix}, or raise federation.clients_per_round"
    )


def _check_model(
    config: Config,
    role: str,
    path: str,
    device: torch.device,
    found: _Checked,
) -> None:
    """Check a model's directory, configuration, layers, tokenizer, chat template and weights.

    Of the weights only names and shapes are read. The tokenizer is checked though layers or weights
    are wrong, but not without a configuration, which it needs.
    """
    key, attempt = f"{role}.path", found.mistakes.attempt
    folder = attempt(lambda: check_model_dir(path, key))
    if folder is None or attempt(lambda: read_config(folder, key)) is None:
        return

    # Sizes, with LoRA where the model is trained.
    lora = None
    if role == "model":
        lora = config.model.lora
    elif role == "guard":
        lora = config.guard.lora
    dtype, attention = config.model.dtype, config.model.attention
    shape = attempt(
        lambda: model_shape(folder, lora, dtype=dtype, attention=attention, device=device, key=key),
    )

    # Tokenizer and chat template.
    chat = attempt(lambda: load_chat(folder, key))
    if chat is not None and role == "guard":
        attempt(lambda: GuardFormat(chat, config.guard.policy, config.guard.max_length))
    if shape is None:
        return
    found.shapes[role] = shape
    if chat is not None:
        attempt(lambda: check_tokenizer(chat, shape.vocab_size, folder, key))

    # A small model of the same architecture, where one can be made.
    if attempt(lambda: try_model(folder, shape.attention.name, key)) is False:
        found.untried.append(role)
