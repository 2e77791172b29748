"""Memory of a run's stages on one rank, and the work of a round, from the configuration."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from fedsim.base.planner import plan_round
from fedsim.config import Config
from fedsim.federation.algorithms import ADAPTER, build_algorithm
from fedsim.model.shape import ModelShape
from fedsim.run.memory import Need, generation_need, scoring_need, training_need

TAIL_TOKENS = 32
"""Lower bound of the tokens of a guard's closing instruction, which follows every exchange."""

LOCAL: Final = "local training"
DPO: Final = "CAI (DPO)"
TUNING: Final = "guard fine-tuning"
GENERATION: Final = "generation"
"""Stages, as :class:`Need` and the manifest name them."""


@dataclass(frozen=True)
class TrainingStage:
    """A stage whose memory grows with the tokens of one forward and backward pass.

    Attributes:
        name: of the stage.
        micro_tokens: tokens of one micro-batch of the longest rows, which always share a pass.
        batch_tokens: tokens of a whole batch of the longest rows.
        need: memory of the stage, from the tokens of its passes.
    """

    name: str
    micro_tokens: int
    batch_tokens: int
    need: Callable[[int], Need]

    def fitting(self, num_bytes: int) -> int:
        """Most tokens of a pass that fit into ``num_bytes``: 0 to ``batch_tokens``."""
        sizes = range(1, self.batch_tokens + 1)
        return bisect_right(sizes, num_bytes, key=lambda tokens: self.need(tokens).num_bytes)


def memory_needs(
    config: Config,
    shapes: Mapping[str, ModelShape],
    num_ranks: int,
    pass_tokens: Mapping[str, int] | None = None,
) -> list[Need]:
    """Upper bounds of each stage's memory on one rank, at the longest rows that are allowed.

    Args:
        shapes: sizes of the models in use, by role.
        pass_tokens: most tokens of a training pass by stage, where they are more than a micro-batch
            has (:func:`tokens_of_passes`).
    """
    model, local, cai, evaluation = shapes["model"], config.local, config.cai, config.eval

    # Training stages, at the tokens of their largest pass.
    more = pass_tokens or {}
    training = {}
    for stage in training_stages(config, shapes, num_ranks):
        training[stage.name] = stage.need(max(stage.micro_tokens, more.get(stage.name, 0)))

    # The guard, beside the model where it stays to classify replies.
    vector_bytes, guard_bytes = _vector_bytes(config, model), _guard_bytes(config, shapes)
    needs = []
    if TUNING in training:
        needs.append(training[TUNING])
    if "guard" in shapes:
        beside = 0
        if evaluation.guard_judge != "none":
            beside = model.weight_bytes + vector_bytes
        needs.append(_guard_scoring(config, shapes["guard"], beside))
    needs += [training[name] for name in (LOCAL, DPO) if name in training]

    # Generation: a row's context is its prompt and all turns that the cache keeps.
    turns = 2 * evaluation.max_new_tokens  # MT-Bench's two replies
    if cai.is_on:
        turns = max(turns, 3 * cai.max_new_tokens)  # response, critique, revision
    context = min(config.model.max_context, model.max_positions, turns + local.max_length)
    needs.append(
        generation_need(
            model,
            GENERATION,
            "eval.batch_size",
            num_rows=evaluation.batch_size,
            num_tokens=context,
            beside=guard_bytes + vector_bytes,
        )
    )

    # A local judge reads both replies of an exchange and writes its rating.
    if "judge" in shapes:
        answers = 2 * evaluation.max_new_tokens
        needs.append(
            generation_need(
                shapes["judge"],
                "judging",
                "eval.batch_size",
                num_rows=evaluation.batch_size,
                num_tokens=config.judge.max_new_tokens + answers + local.max_length,
                beside=guard_bytes + model.weight_bytes + vector_bytes,
            )
        )
    return needs


def training_stages(
    config: Config,
    shapes: Mapping[str, ModelShape],
    num_ranks: int,
) -> list[TrainingStage]:
    """The run's training stages, in the order in which they come first.

    Vectors as long as the adapter, in fp32: the adapter, its gradient and AdamW's two moments (4);
    the server's; while it trains, in exact mode a gradient of each micro-batch of the batch, else
    one sum; at the end of a round, the delta of each client that the rank has trained, and the
    change of the control variate where there is one, which itself is held for one client at a time
    (if all clients have as many tokens). Every rank also holds a cohort's deltas where the
    algorithm wants them, and those of its attackers while they are changed; what a user's rule
    computes with them comes on top.
    """
    model, local, cai, guard = shapes["model"], config.local, config.cai, config.guard
    algorithm = build_algorithm(config.federation, config.server_optimizer)
    standing, guard_bytes = _standing_vectors(config), _guard_bytes(config, shapes)

    # Deltas on one rank: of the clients that it trains, and of those that are gathered.
    gathered, _ = round_work(config)
    if algorithm.wants != "updates":
        num_clients = config.federation.num_clients
        attackers = sum(attack.num_attackers(num_clients) for attack in config.attacks)
        gathered = min(gathered, attackers)
    held = clients_per_rank(config, num_ranks) + gathered
    outcomes = (1 + algorithm.has_control) * held + algorithm.has_control

    def stage(
        name: str,
        shape: ModelShape,
        *,
        max_length: int,
        rows: int,
        batch_size: int,
        num_vectors: int,
        beside: int = 0,
    ) -> TrainingStage:
        """A stage with so many rows of at most ``max_length`` tokens for each item of a batch."""

        def need(num_tokens: int) -> Need:
            return training_need(
                shape,
                name,
                "local.micro_batch_size",
                num_tokens=num_tokens,
                row_tokens=max_length,
                num_vectors=num_vectors + _num_gradients(config, batch_size),
                beside=beside,
            )

        item_tokens = rows * max_length
        return TrainingStage(
            name,
            local.micro_batch_size * item_tokens,
            batch_size * item_tokens,
            need,
        )

    # Stages in the order of a run.
    stages = []
    uses_tuned = guard.is_model or config.eval.guard_judge == "tuned"
    if "guard" in shapes and guard.tune_epochs > 0 and uses_tuned:
        stages.append(
            stage(
                TUNING,
                shapes["guard"],
                max_length=guard.max_length,
                rows=1,
                batch_size=guard.tune_batch_size,
                num_vectors=4,
            )
        )
    stages.append(
        stage(
            LOCAL,
            model,
            max_length=local.max_length,
            rows=1,
            batch_size=local.batch_size,
            num_vectors=standing + outcomes,
            beside=guard_bytes,
        )
    )
    if cai.is_on:
        stages.append(
            stage(
                DPO,
                model,
                max_length=cai.max_length,
                rows=2,  # chosen and rejected
                batch_size=cai.batch_size,
                num_vectors=standing,
                beside=guard_bytes,
            )
        )
    return stages


def tokens_of_passes(
    config: Config,
    shapes: Mapping[str, ModelShape],
    num_ranks: int,
    *,
    free_bytes: int,
    usable_bytes: int,
) -> dict[str, int]:
    """Most tokens of a training pass outside exact mode, by stage, derived from memory.

    As many as fit into ``usable_bytes``, up to a whole batch of the longest rows; else those of a
    micro-batch of the longest rows, as far as ``free_bytes`` hold them. Exact mode has a pass for
    each micro-batch.

    Args:
        shapes: sizes of the models in use, by role.
        free_bytes: memory of the rank with least.
        usable_bytes: what passes may be planned to take of it
            (:func:`fedsim.run.memory.usable_memory`); 0: nothing is derived.
    """
    if config.parallel.exact or usable_bytes <= 0:
        return {}
    found = {}
    for stage in training_stages(config, shapes, num_ranks):
        if stage.name == TUNING and config.guard.deepspeed:
            continue  # its passes are DeepSpeed's micro-batches
        configured = min(stage.micro_tokens, stage.fitting(free_bytes))
        found[stage.name] = max(1, configured, stage.fitting(usable_bytes))
    return found


def _standing_vectors(config: Config) -> int:
    """Vectors of the adapter's size that are always there: adapter, gradient, moments, server's."""
    algorithm = build_algorithm(config.federation, config.server_optimizer)
    return 4 + len({ADAPTER, *algorithm.vector_names})


def _vector_bytes(config: Config, model: ModelShape) -> int:
    """Memory of the standing vectors."""
    return 4 * _standing_vectors(config) * model.adapter_size


def _guard_bytes(config: Config, shapes: Mapping[str, ModelShape]) -> int:
    """Bytes of a guard that classifies replies, with its adapter and gradient."""
    if config.eval.guard_judge == "none":
        return 0
    return shapes["guard"].weight_bytes + 4 * 2 * shapes["guard"].adapter_size


def _guard_scoring(config: Config, guard: ModelShape, model_bytes: int) -> Need:
    """Memory of scoring, beside the model where the guard judges replies."""
    settings = config.guard
    return scoring_need(
        guard,
        "guard scoring",
        "guard.batch_tokens",
        num_tokens=max(settings.batch_tokens, settings.max_length),
        head_tokens=settings.max_length,
        tail_tokens=TAIL_TOKENS,
        beside=4 * 2 * guard.adapter_size + model_bytes,
    )


def _num_gradients(config: Config, batch_size: int) -> int:
    """Vectors that adding up a step's gradient takes beside the gradient itself."""
    return config.local.micro_batches(batch_size) if config.parallel.exact else 1


def clients_per_rank(config: Config, num_ranks: int) -> int:
    """Clients that the busiest rank trains in a round, if all clients are equal."""
    local = config.local
    equal = dict.fromkeys(range(round_work(config)[0]), 1)
    plan = plan_round(
        equal,
        [1.0] * num_ranks,
        local.num_micro_batches,
        wide_lanes=config.parallel.wide_lanes,
    )
    counts = [0] * num_ranks
    for job in plan.jobs:
        for rank in job.ranks:
            counts[rank] += 1
    return max(counts)


def round_work(config: Config) -> tuple[int, int]:
    """Participants of a round, and the local steps of each."""
    algorithm = build_algorithm(config.federation, config.server_optimizer)
    participation = algorithm.participation(config.federation, config.seed)
    return len(participation.drawn(0)), participation.num_steps(config.local.steps)
