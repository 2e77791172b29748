"""A Hugging Face model as the judge of MT-Bench, over all ranks, greedy.

A prompt that does not fit into the judge's context is not asked: its beginning, which is where the instruction stands,
would be lost. It is counted, and looked at again in the next attempt, whose context or ``judge.max_new_tokens`` may be
another.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch

from fedsim.base.ranks import Ranks
from fedsim.config import Config
from fedsim.evaluate.fastchat import CUT, NOT_ASKED
from fedsim.evaluate.judge_prompts import Match
from fedsim.fused.choice import fuse
from fedsim.generate.engine import Engine, Sampling
from fedsim.model.load import load_base, max_positions


def judge_locally(
    config: Config,
    ranks: Ranks,
    device: torch.device,
    matches: Sequence[Match],
    wanted: Collection[int],
    on_progress: Callable[[int, int], None] | None = None,
) -> list[str | None]:
    """One text per match, in order, the same on every rank: its judgment (with :data:`CUT` before it if
    it did not end), or :data:`NOT_ASKED` and why.

    The model is loaded for this call alone.

    Args:
        config: ``judge.path`` and ``judge.max_new_tokens``; ``model.dtype`` and ``model.attention`` hold for the judge
            too, and units have ``eval.batch_size`` rows.
        ranks: who shares the work.
        device: of this rank.
        matches: at least one.
        wanted: places in ``matches`` of those that need a judgment. If none of them fits into the judge's context, no
            match is judged, and those that would fit get None.
        on_progress: called with (done, total) rows of this rank.

    Raises:
        ModelError: the model cannot be loaded, or its chat template takes no system message.
    """
    model, chat = load_base(
        config.judge.path,
        dtype=config.model.dtype,
        attention=config.model.attention,
        device=device,
        key="judge.path",
        ranks=ranks,
    )
    fuse(model, ranks)
    engine = Engine(
        model,
        chat,
        ranks,
        batch_size=config.eval.batch_size,
        max_context=max_positions(model),
        seed=config.seed,
        on_progress=on_progress,
    )
    judgments = judge_with(engine, matches, wanted, config.judge.max_new_tokens)
    del engine, model
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the model under test needs the room
    return judgments


def judge_with(
    engine: Engine, matches: Sequence[Match], wanted: Collection[int], max_new_tokens: int
) -> list[str | None]:
    """:func:`judge_locally` with a model that is loaded."""
    num_new = min(max_new_tokens, engine.max_context // 2)
    room = engine.max_context - num_new
    lengths = [len(engine.chat.prompt_ids(match.conversation)) for match in matches]
    fitting = [i for i, length in enumerate(lengths) if length <= room]
    judgments: list[str | None] = [
        f"{NOT_ASKED}it has {length} tokens, and the judge's context leaves room for {room} of them."
        if length > room
        else None
        for length in lengths
    ]
    if set(fitting) & set(wanted):  # all that fit: which rows share a batch may show in the last bits
        replies = engine.generate([matches[i].conversation for i in fitting], Sampling(0.0, num_new), ("judge",))
        for i, reply in zip(fitting, replies, strict=True):
            judgments[i] = f"{CUT}{reply.text}" if reply.truncated else reply.text
    return judgments
