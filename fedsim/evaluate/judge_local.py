"""A Hugging Face model as the judge of MT-Bench, over all ranks, greedy.

A prompt that does not fit into the judge's context is not asked: its beginning, which holds the
instruction, would be lost. It is counted, and tried again in the next attempt, which may have
another context or ``judge.max_new_tokens``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import ClassVar

import torch

from fedsim.config import JudgeConfig, ModelConfig
from fedsim.data.chat import user_turn
from fedsim.evaluate.fastchat import CUT, NOT_ASKED
from fedsim.evaluate.judge_contract import Outcome, OwnJudge, Work
from fedsim.evaluate.judge_prompts import JudgePrompt, Match
from fedsim.fused.choice import fuse
from fedsim.generate.engine import Engine, Sampling
from fedsim.model.load import check_model_dir, load_base, load_chat, max_positions, model_dir


class LocalJudge(OwnJudge):
    """A Hugging Face model on this machine as a judge.

    All ranks share its work. It is loaded for each model's answers.

    Args:
        settings: path of the judge and length of its judgments.
        model: dtype and attention, the same as of the model under test.
        batch_size: rows of a unit of work.
        seed: of the run.
    """

    unit: ClassVar[str] = "rows"

    def __init__(
        self,
        settings: JudgeConfig,
        model: ModelConfig,
        batch_size: int,
        seed: int,
    ) -> None:
        self.settings = settings
        self.model = model
        self.batch_size = batch_size
        self.seed = seed

    @property
    def name(self) -> str:
        """Name of the model's directory."""
        # The directory's name, without links.
        path = self.settings.path
        if path == "embedded":
            return path
        return model_dir(path).resolve().name

    def check(self, prompts: Mapping[str, JudgePrompt]) -> None:
        """Check the model's directory and, where a prompt has a system message, its chat template.

        Raises:
            ModelError: ``judge.path`` is no model directory, or its chat template leaves the system
                message out.
        """
        folder = check_model_dir(self.settings.path, "judge.path")
        # A short prompt shows whether the template writes a system message.
        if any(prompt.system for prompt in prompts.values()):
            chat = load_chat(folder, "judge.path")
            chat.prompt([{"role": "system", "content": "Be fair."}, user_turn("Why?")])

    def judge_all(self, work: Work, what: str) -> Outcome:
        """Judge all answers of the model, also those that have a judgment.

        The composition of a batch may show in the last bits of its rows, so that it must not depend
        on which judgments the file already holds.
        """
        judged = {}
        for place, text in enumerate(self.judgments(work)):
            if text is not None:
                judged[place] = text
        work.keep_all(judged)
        return Outcome()

    def judgments(self, work: Work) -> list[str | None]:
        """Load the model and judge with it; see :func:`judge_with`.

        The result is the same on every rank.

        Raises:
            ModelError: the model cannot be loaded, or its chat template takes no system message.
        """
        ranks, device = work.ranks, work.device
        model, chat = load_base(
            self.settings.path,
            dtype=self.model.dtype,
            attention=self.model.attention,
            device=device,
            key="judge.path",
            ranks=ranks,
        )
        # The same kernels as of the model under test.
        fuse(model, ranks)
        engine = Engine(
            model,
            chat,
            ranks,
            batch_size=self.batch_size,
            max_context=max_positions(model),
            seed=self.seed,
            on_progress=work.report,
        )
        judgments = judge_with(
            engine,
            work.matches,
            sorted(work.wanted),
            self.settings.max_new_tokens,
        )
        del engine, model
        if device.type == "cuda":
            torch.cuda.empty_cache()  # the model under test needs the room
        return judgments


def judge_with(
    engine: Engine,
    matches: Sequence[Match],
    wanted: Collection[int],
    max_new_tokens: int,
) -> list[str | None]:
    """Judge with a loaded model.

    Args:
        engine: of the judge.
        matches: at least one.
        wanted: places in ``matches`` of those that need a judgment. If none of them fits into the
            judge's context, no match is judged, and those that would fit get None.
        max_new_tokens: longest judgment; at most half of the context.

    Returns:
        One text for each match, in order: its judgment, with :data:`CUT` before it if it did not
        end, or :data:`NOT_ASKED` and the reason.
    """
    # Prompts that leave no room for the judgment are not asked; lengths are in tokens.
    num_new = min(max_new_tokens, engine.max_context // 2)
    room = engine.max_context - num_new
    fitting = []
    judgments: list[str | None] = [None] * len(matches)
    for i, match in enumerate(matches):
        length = len(engine.chat.prompt_ids(match.conversation))
        if length <= room:
            fitting.append(i)
            continue
        reason = f"it has {length} tokens, and the judge's context leaves room for {room} of them."
        judgments[i] = f"{NOT_ASKED}{reason}"

    # All that fit are judged: the composition of a batch may show in the last bits.
    if set(fitting) & set(wanted):
        replies = engine.generate(
            [matches[i].conversation for i in fitting],
            Sampling(0.0, num_new),
            ("judge",),
        )
        for i, reply in zip(fitting, replies, strict=True):
            judgments[i] = reply.text
            if reply.truncated:
                judgments[i] = f"{CUT}{reply.text}"
    return judgments
