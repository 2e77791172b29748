"""Before training: find every mistake that can be found without computing, and say what the run will do.

Each check is cheap (no weights are read), runs on every rank, and is made before the first expensive stage of every
run; ``launch/run.py --check`` makes them, prints the plan and stops.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from fedsim.config import Config
from fedsim.errors import ConfigError
from fedsim.evaluate.judge_inputs import check_judge
from fedsim.federation.registry import build_algorithm
from fedsim.model.load import LoraSettings, check_model_dir, load_chat
from fedsim.model.memory import Need, free_memory, generation_need, training_need
from fedsim.model.shape import ModelShape, model_shape
from fedsim.parallel.planner import useful_ranks
from fedsim.parallel.world import World
from fedsim.parallel.zero_config import zero_settings
from fedsim.record.tables import byte_size
from fedsim.safety.cai_stage import constitution_file
from fedsim.safety.constitution import load_constitution
from fedsim.safety.guard_format import GuardFormat


@dataclass(frozen=True)
class Preflight:
    """What the checks found.

    Attributes:
        shapes: sizes of the models in use, by role ("model", "guard", "judge").
        needs: memory of each stage on one rank, an upper bound.
        free_bytes: memory that each rank can have.
    """

    shapes: Mapping[str, ModelShape]
    needs: Sequence[Need]
    free_bytes: Sequence[int]

    @property
    def tightest(self) -> Need:
        """The stage that needs most."""
        return max(self.needs, key=lambda need: need.num_bytes)


def models_in_use(config: Config) -> dict[str, str]:
    """Path of each model that the run loads, by role."""
    models = {"model": config.model.path}
    if config.guard.kind == "llama_guard" or config.eval.guard_judge != "none":
        models["guard"] = config.guard.path
    if config.judge.kind == "local":
        models["judge"] = config.judge.path
    return models


def preflight(config: Config, world: World) -> Preflight:
    """Check lanes, models, constitution and memory on every rank.

    Raises:
        ConfigError, DataError, ModelError: the first mistake by rank, the same error on every rank.
    """
    found = world.ranks.each(lambda: _check(config, world))
    shapes = found[world.rank][0]
    free = [free_bytes for _, free_bytes in found]
    least = free.index(min(free))
    for role, shape in shapes.items():
        if shape.weight_bytes > free[least]:
            raise ConfigError(
                f"{role}.path={models_in_use(config)[role]!r}: its weights take {byte_size(shape.weight_bytes)} in "
                f"{str(shape.dtype).removeprefix('torch.')}, and rank {least} has {byte_size(free[least])} free; start "
                "fewer processes on this machine, set model.dtype=bfloat16, or use a smaller model"
            )
    return Preflight(shapes, memory_needs(config, shapes), free)


def _check(config: Config, world: World) -> tuple[dict[str, ModelShape], int]:
    """One rank's checks: sizes of the models, and the memory that it can have."""
    check_world_size(config, world.size)
    shapes = {role: _check_model(config, role, path, world.device) for role, path in models_in_use(config).items()}
    if config.cai.iterations > 0:
        load_constitution(constitution_file(config.cai.constitution))
    if config.guard.kind == "llama_guard" and config.guard.deepspeed:
        zero_settings(config, world.size)
    check_judge(config)
    return shapes, free_memory(world.device, world.size)


def check_world_size(config: Config, num_ranks: int) -> None:
    """Every rank must have a part in local training.

    Raises:
        ConfigError: there are more ranks than lanes can use.
    """
    local, wide = config.local, config.parallel.wide_lanes
    num_micro_batches = -(-local.batch_size // local.micro_batch_size)
    num_clients, _ = round_work(config)
    most = useful_ranks(num_clients, num_micro_batches, wide_lanes=wide)
    if num_ranks > most:
        raise ConfigError(
            f"{num_ranks} processes: must be <= {most}, the lanes that a round of {num_clients} client(s) can "
            f"use ({f'{num_micro_batches} micro-batches a client' if wide else 'parallel.wide_lanes=false'}); start "
            f"fewer, {'lower local.micro_batch_size' if wide else 'set parallel.wide_lanes=true'}, or raise "
            "federation.clients_per_round"
        )


def _check_model(config: Config, role: str, path: str, device: torch.device) -> ModelShape:
    """A model's directory, tokenizer, chat template and layers, without its weights."""
    key = f"{role}.path"
    folder = check_model_dir(path, key)
    chat = load_chat(folder, key)
    lora = None
    if role in ("model", "guard"):
        settings = config.model if role == "model" else config.guard
        lora = LoraSettings(settings.lora_r, settings.lora_alpha, settings.lora_dropout, tuple(settings.lora_targets))
    if role == "guard":
        GuardFormat(chat, config.guard.policy, config.guard.max_length)
    return model_shape(folder, lora, dtype=config.model.dtype, device=device, key=key)


def memory_needs(config: Config, shapes: Mapping[str, ModelShape]) -> list[Need]:
    """What each stage needs on one rank, at the longest rows that the configuration allows."""
    model, local, cai, judged = shapes["model"], config.local, config.cai, config.eval
    rows = local.micro_batch_size
    needs = []
    if "guard" in shapes:
        guard, settings = shapes["guard"], config.guard
        tokens = rows * settings.max_length
        needs.append(
            training_need(guard, "guard fine-tuning", "local.micro_batch_size", num_tokens=tokens, num_vectors=5)
        )
        needs.append(
            generation_need(
                guard, "guard scoring", "guard.batch_size", num_rows=settings.batch_size, num_tokens=settings.max_length
            )
        )
    needs.append(
        training_need(
            model, "local training", "local.micro_batch_size", num_tokens=rows * local.max_length, num_vectors=8
        )
    )
    if cai.iterations > 0:
        tokens = 2 * rows * cai.max_length  # chosen and rejected
        needs.append(training_need(model, "CAI (DPO)", "local.micro_batch_size", num_tokens=tokens, num_vectors=8))
    context = min(config.model.max_context, model.max_positions, 2 * judged.max_new_tokens + local.max_length)
    needs.append(
        generation_need(model, "generation", "eval.batch_size", num_rows=judged.batch_size, num_tokens=context)
    )
    if "judge" in shapes:
        context = config.judge.max_new_tokens + 2 * judged.max_new_tokens + local.max_length
        needs.append(
            generation_need(
                shapes["judge"], "judging", "eval.batch_size", num_rows=judged.batch_size, num_tokens=context
            )
        )
    return needs


def round_work(config: Config) -> tuple[int, int]:
    """Participants of a round, and the local steps of each."""
    algorithm = build_algorithm(config.federation, config.server_optimizer)
    participation = algorithm.participation(config.federation, config.seed)
    return len(participation.drawn(0)), participation.num_steps(config.local.steps)
