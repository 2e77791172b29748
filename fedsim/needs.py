"""How much memory the stages of a run need on one rank, and how much work a round has, from the configuration."""

from __future__ import annotations

from collections.abc import Mapping

from fedsim.config import Config
from fedsim.federation.algorithms import ADAPTER
from fedsim.federation.registry import build_algorithm
from fedsim.model.memory import Need, generation_need, scoring_need, training_need
from fedsim.model.shape import ModelShape
from fedsim.parallel.planner import plan_round

TAIL_TOKENS = 32  # of the closing instruction, which follows every exchange that a guard judges; it is longer


def memory_needs(config: Config, shapes: Mapping[str, ModelShape], num_ranks: int) -> list[Need]:
    """What each stage needs on one rank, at the longest rows that the configuration allows.

    Vectors as long as the adapter, in fp32: the adapter, its gradient and AdamW's two moments (4); the server's; while
    it trains, in exact mode a gradient of each micro-batch of the batch, else one sum; at the end of a round, the delta
    of each client that the rank has trained, and the change of the control variate where there is one, which itself is
    held for one client at a time (if all clients have as many tokens). Every rank also holds a cohort's deltas where
    the algorithm wants them, and those of its attackers while they are changed; what a user's rule computes with them
    comes on top.
    """
    model, local, cai, judged = shapes["model"], config.local, config.cai, config.eval
    rows = local.micro_batch_size
    algorithm = build_algorithm(config.federation, config.server_optimizer)
    standing = 4 + len({ADAPTER, *algorithm.vector_names})
    model_bytes = model.weight_bytes + 4 * standing * model.adapter_size
    guard_bytes = 0
    if judged.guard_judge != "none":  # stays with its adapter and that one's gradient
        guard_bytes = shapes["guard"].weight_bytes + 4 * 2 * shapes["guard"].adapter_size
    needs = _guard_needs(config, shapes["guard"], model_bytes) if "guard" in shapes else []
    cohort, _ = round_work(config)
    attackers = sum(attack.num_attackers(config.federation.num_clients) for attack in config.attacks)
    gathered = cohort if algorithm.wants == "updates" else min(cohort, attackers)
    held = clients_per_rank(config, num_ranks) + gathered
    outcomes = (1 + algorithm.has_control) * held + algorithm.has_control
    needs.append(
        training_need(
            model,
            "local training",
            "local.micro_batch_size",
            num_tokens=rows * local.max_length,
            row_tokens=local.max_length,
            num_vectors=standing + _num_gradients(config, local.batch_size) + outcomes,
            beside=guard_bytes,
        )
    )
    if cai.is_on:
        needs.append(
            training_need(
                model,
                "CAI (DPO)",
                "local.micro_batch_size",
                num_tokens=2 * rows * cai.max_length,  # chosen and rejected
                row_tokens=cai.max_length,
                num_vectors=standing + _num_gradients(config, cai.batch_size),
                beside=guard_bytes,
            )
        )
    cai_tokens = 3 * cai.max_new_tokens if cai.is_on else 0
    turns = max(2 * judged.max_new_tokens, cai_tokens)  # MT-Bench's and CAI's, which the cache keeps
    context = min(config.model.max_context, model.max_positions, turns + local.max_length)
    needs.append(
        generation_need(
            model,
            "generation",
            "eval.batch_size",
            num_rows=judged.batch_size,
            num_tokens=context,
            beside=guard_bytes + model_bytes - model.weight_bytes,
        )
    )
    if "judge" in shapes:
        needs.append(
            generation_need(
                shapes["judge"],
                "judging",
                "eval.batch_size",
                num_rows=judged.batch_size,
                num_tokens=config.judge.max_new_tokens + 2 * judged.max_new_tokens + local.max_length,
                beside=guard_bytes + model_bytes,
            )
        )
    return needs


def _guard_needs(config: Config, guard: ModelShape, model_bytes: int) -> list[Need]:
    """The guard's stages: fine-tuning before the model is loaded; scoring beside it where the guard judges replies."""
    settings, judged, rows = config.guard, config.eval, config.local.micro_batch_size
    needs = []
    if settings.tune_epochs > 0 and (settings.kind == "llama_guard" or judged.guard_judge == "tuned"):
        needs.append(
            training_need(
                guard,
                "guard fine-tuning",
                "local.micro_batch_size",
                num_tokens=rows * settings.max_length,
                row_tokens=settings.max_length,
                num_vectors=4 + _num_gradients(config, settings.tune_batch_size),
            )
        )
    needs.append(
        scoring_need(
            guard,
            "guard scoring",
            "guard.batch_tokens",
            num_tokens=max(settings.batch_tokens, settings.max_length),
            head_tokens=settings.max_length,
            tail_tokens=TAIL_TOKENS,
            beside=4 * 2 * guard.adapter_size + (model_bytes if judged.guard_judge != "none" else 0),
        )
    )
    return needs


def _num_gradients(config: Config, batch_size: int) -> int:
    """Vectors that adding up a step's gradient takes beside the gradient itself."""
    return -(-batch_size // config.local.micro_batch_size) if config.parallel.exact else 1


def clients_per_rank(config: Config, num_ranks: int) -> int:
    """Clients that the busiest rank trains in a round if all are equal."""
    local = config.local
    equal = dict.fromkeys(range(round_work(config)[0]), 1)
    num_micro_batches = -(-local.batch_size // local.micro_batch_size)
    plan = plan_round(equal, [1.0] * num_ranks, num_micro_batches, wide_lanes=config.parallel.wide_lanes)
    return max(sum(rank in job.ranks for job in plan.jobs) for rank in range(num_ranks))


def round_work(config: Config) -> tuple[int, int]:
    """Participants of a round, and the local steps of each."""
    algorithm = build_algorithm(config.federation, config.server_optimizer)
    participation = algorithm.participation(config.federation, config.seed)
    return len(participation.drawn(0)), participation.num_steps(config.local.steps)
