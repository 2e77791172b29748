"""Before training: find every mistake that can be found without computing, and say what the run will do.

Each check is cheap (no weights are read, only their names and shapes), runs on every rank, and is made before the first
expensive stage of every run; ``launch/run.py --check`` makes them, prints the plan and stops.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fedsim.config import Config
from fedsim.errors import ConfigError
from fedsim.evaluate.judge_inputs import check_judge
from fedsim.model.load import LoraSettings, check_model_dir, check_tokenizer, load_chat
from fedsim.model.memory import Need, free_memory
from fedsim.model.shape import ModelShape, model_shape
from fedsim.needs import memory_needs, round_work
from fedsim.parallel.planner import useful_ranks
from fedsim.parallel.world import World
from fedsim.parallel.zero_config import zero_settings
from fedsim.record.places import DiskRoom, check_disk, check_folder, run_folder
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
        room: space of the run directory.
    """

    shapes: Mapping[str, ModelShape]
    needs: Sequence[Need]
    free_bytes: Sequence[int]
    room: DiskRoom

    def warnings(self) -> list[str]:
        """What may go wrong, one line each: stages whose upper bound is more than the rank with least memory has."""
        least = min(self.free_bytes)
        return [
            f"{need.stage} may not fit into {byte_size(least)} (at most {byte_size(need.num_bytes)}); lower {need.key}"
            for need in self.needs
            if need.num_bytes > least
        ]


def models_in_use(config: Config) -> dict[str, str]:
    """Path of each model that the run loads, by role."""
    models = {"model": config.model.path}
    if config.guard.kind == "llama_guard" or config.eval.guard_judge != "none":
        models["guard"] = config.guard.path
    if config.judge.kind == "local":
        models["judge"] = config.judge.path
    return models


def loaded_together(config: Config) -> list[list[str]]:
    """Roles of the models that are in memory at the same time.

    The guard filters before the model is loaded, and stays if it is to judge replies; a local judge comes for each
    evaluation.
    """
    roles = models_in_use(config)
    stays = config.eval.guard_judge != "none"
    return [
        *([["guard"]] if "guard" in roles and not stays else []),
        ["model", *(["guard"] if stays else []), *(["judge"] if "judge" in roles else [])],
    ]


def preflight(config: Config, world: World) -> Preflight:
    """Check lanes, models, constitution, folders, disk and memory on every rank.

    Raises:
        ConfigError, DataError, ModelError: the first mistake by rank, the same error on every rank.
    """
    found = world.ranks.each(lambda: _check(config, world))
    shapes, room, _ = found[world.rank]
    free = [free_bytes for *_, free_bytes in found]
    least = free.index(min(free))
    for roles in loaded_together(config):
        weights = sum(shapes[role].weight_bytes for role in roles)
        if weights > free[least]:
            paths = " and ".join(f"{role}.path={models_in_use(config)[role]!r}" for role in roles)
            raise ConfigError(
                f"{paths}: {'its weights' if len(roles) == 1 else 'their weights, which are loaded together,'} take "
                f"{byte_size(weights)} in {str(shapes['model'].dtype).removeprefix('torch.')}, and rank {least} has "
                f"{byte_size(free[least])} free; start fewer processes on this machine, set model.dtype=bfloat16, or "
                "use a smaller model"
            )
    return Preflight(shapes, memory_needs(config, shapes, world.size), free, room)


def _check(config: Config, world: World) -> tuple[dict[str, ModelShape], DiskRoom, int]:
    """One rank's checks: sizes of the models, space on the disk, and the memory that the rank can have."""
    check_world_size(config, world.size)
    check_folder(run_folder(config), f"record.dir={config.record.dir!r}, name={config.name!r}")
    check_folder(Path(os.path.expanduser(config.record.artefacts)), f"record.artefacts={config.record.artefacts!r}")
    shapes = {role: _check_model(config, role, path, world.device) for role, path in models_in_use(config).items()}
    if config.cai.is_on:
        load_constitution(constitution_file(config.cai.constitution))
    if config.guard.kind == "llama_guard" and config.guard.deepspeed:
        zero_settings(config, world.size)
    check_judge(config)
    room = check_disk(config, shapes["model"].adapter_size, round_work(config)[0])
    return shapes, room, free_memory(world.device, world.size)


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
    """A model's directory, configuration, layers, tokenizer and chat template; of its weights, names and shapes."""
    key = f"{role}.path"
    folder = check_model_dir(path, key)
    lora = None
    if role in ("model", "guard"):
        settings = config.model if role == "model" else config.guard
        lora = LoraSettings(settings.lora_r, settings.lora_alpha, settings.lora_dropout, tuple(settings.lora_targets))
    shape = model_shape(
        folder, lora, dtype=config.model.dtype, attention=config.model.attention, device=device, key=key
    )
    chat = load_chat(folder, key)
    check_tokenizer(chat, shape.vocab_size, folder, key)
    if role == "guard":
        GuardFormat(chat, config.guard.policy, config.guard.max_length)
    return shape
