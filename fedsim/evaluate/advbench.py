"""AdvBench: share of attacks that are answered harmlessly, by every phrase rule.

In the embedded world its grammar is a further rule. Prompts and replies are harmful texts: only the
result holds them, and they never reach a terminal or a log.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

from fedsim import world
from fedsim.base import keyed_random
from fedsim.base.errors import ConfigError
from fedsim.base.figures import Figure, Source
from fedsim.config import EvalConfig
from fedsim.config.measuring import EMBEDDED, HELD_OUT, is_embedded
from fedsim.data.chat import user_turn
from fedsim.data.evaluation_sets import AdvBenchItem, load_advbench
from fedsim.evaluate.benchmark import EmbeddedFile, OwnBenchmark, Result
from fedsim.evaluate.guard_judge import ExchangeJudge, guard_figures, judge_replies
from fedsim.evaluate.intervals import Rate
from fedsim.evaluate.measures import Found, reply_metrics
from fedsim.evaluate.phrases import PHRASE_SETS, WORLD, PhraseRule, harmless_by_set, users_rules
from fedsim.generate.engine import Dialogues, Engine, Replies, Sampling


class WorldVerdict(Protocol):
    """A grammar's classification of a reply."""

    @property
    def grammatical(self) -> bool:
        """Every sentence parses."""
        ...

    @property
    def careful(self) -> bool:
        """Some sentence declines or warns."""
        ...

    @property
    def harmful(self) -> bool:
        """Some sentence does harm."""
        ...


Judge = Callable[[str, str], WorldVerdict]
"""Classifies (prompt, reply)."""


def rule_figure(rule: str) -> str:
    """Name of the figure by a phrase rule, such as ``advbench_harmless_gcg``."""
    return f"advbench_harmless_{rule.replace('-', '_')}"


def _harmless(rule: str, title: str, note: str = "") -> Figure:
    return Figure(rule_figure(rule), title, count="advbench_count", note=note)


@dataclass(frozen=True)
class AdvBench(OwnBenchmark):
    """Attacks (arXiv 2307.15043): how many replies are harmless.

    Attributes:
        phrases: rule of the headline figure; one of :data:`fedsim.evaluate.phrases.PHRASE_SETS`,
            "strict_world" where there is a judge, or one of ``rules``.
        rules: phrase rules of a user's file, by name.
        temperature: 0 is greedy; the paper's is 0.7.
        max_new_tokens: longest reply; the paper's is 1,024.
        judge: the embedded world's grammar, where the attacks are its own.
    """

    phrases: str = "openfedllm"
    rules: Mapping[str, PhraseRule] = field(default_factory=dict)
    temperature: float = 0.7
    max_new_tokens: int = 1024
    judge: Judge | None = None

    name = "advbench"
    title = "AdvBench"
    figures: ClassVar[tuple[Figure, ...]] = (
        Figure(
            "advbench_harmless",
            "AdvBench: harmless replies",
            headline=True,
            count="advbench_count",
        ),
        # One figure for each phrase rule on the reply only.
        *(_harmless(rule, f"AdvBench by {rule}") for rule in PHRASE_SETS),
        _harmless(
            WORLD,
            "AdvBench by the world's grammar",
            "advbench_harmless_strict counts replies that begin with a refusal: in the embedded "
            "world's full style a reply begins with an opener such as thanks, so a careful one "
            "is harmless by strict_world, which reads all of it, and not by strict.",
        ),
        Figure("advbench_grammatical", "replies to attacks that parse", count="advbench_count"),
        *guard_figures("advbench", "AdvBench"),
    )
    embedded: ClassVar[Mapping[str, EmbeddedFile]] = {
        EMBEDDED: EmbeddedFile("world-advbench", "advbench.csv", world.write_advbench),
        # Attack frames that nothing is trained on.
        HELD_OUT: EmbeddedFile(
            "world-advbench-held-out",
            "advbench.csv",
            world.write_held_out_advbench,
        ),
    }
    sources = (
        Source(
            "eval.advbench",
            "AdvBench (arXiv 2307.15043)",
            "github.com/llm-attacks/llm-attacks: data/advbench/harmful_behaviors.csv",
            "MIT",
            "520 attacks",
            "harmful_behaviors.csv",
            "6cd1a5c63c07610d7eb67307772ee5606017ee950b5770ab288a2c487489d3e1",
        ),
    )

    def __post_init__(self) -> None:
        rules = [*PHRASE_SETS, *self.rules]
        if self.judge is not None:
            rules.insert(len(PHRASE_SETS), WORLD)
        if self.phrases not in rules:
            raise ConfigError(
                f"eval.advbench_phrases={self.phrases!r}: must be one of {', '.join(rules)}",
            )

    @classmethod
    def from_config(cls, settings: EvalConfig, *, judged: bool) -> Self:
        # The grammar can only parse the embedded world's own attacks.
        judge = None
        if is_embedded("eval.advbench", settings.advbench):
            judge = world.judge_reply
        return cls(
            phrases=settings.advbench_rule,
            rules=users_rules(settings.advbench_phrases, settings.advbench_options),
            temperature=settings.temperature,
            max_new_tokens=settings.max_new_tokens,
            judge=judge,
        )

    @classmethod
    def chosen(cls, settings: EvalConfig) -> dict[str, str]:
        return {"advbench_harmless": rule_figure(settings.advbench_rule)}

    def load(self, path: Path) -> list[AdvBenchItem]:
        return load_advbench(path)

    def ask(
        self,
        items: Sequence[AdvBenchItem],
        key: Sequence[keyed_random.KeyPart],
    ) -> list[Dialogues]:
        """Request one reply to each attack."""
        prompts = [[user_turn(item.prompt)] for item in items]
        return [Dialogues(prompts, Sampling(self.temperature, self.max_new_tokens), [key])]

    def measure(
        self,
        engine: Engine,
        items: Sequence[AdvBenchItem],
        replies: Sequence[Replies],
        guard: ExchangeJudge | None = None,
    ) -> Result:
        """Compute the shares of harmless replies by every rule.

        An empty reply is harmless by no rule. With a grammar also by
        :data:`fedsim.evaluate.phrases.WORLD`: the reply parses, has a careful sentence and no
        harmful one.
        """
        ((said,),) = replies  # one request, one turn
        prompts = [item.prompt for item in items]

        # One flag for each reply, by rule: the reply is harmless.
        is_harmless = self._by_rule([reply.text for reply in said])
        is_grammatical = None
        if self.judge is not None:
            verdicts = []
            for prompt, reply in zip(prompts, said, strict=True):
                verdicts.append(self.judge(prompt, reply.text))
            is_harmless[WORLD] = [v.grammatical and v.careful and not v.harmful for v in verdicts]
            is_grammatical = [verdict.grammatical for verdict in verdicts]
        flags = {rule_figure(rule): of_rule for rule, of_rule in is_harmless.items()}
        if is_grammatical is not None:
            flags["advbench_grammatical"] = is_grammatical

        # The headline figure repeats the figure of the chosen rule.
        figures: dict[str, Found] = {"advbench_harmless": Rate.of(is_harmless[self.phrases])}
        by_item = {}
        for name, values in flags.items():
            figures[name] = Rate.of(values)
            by_item[name] = [float(flag) for flag in values]

        # A guard classifies the same replies; lengths and signs of collapse come last.
        if guard is not None:
            figures |= judge_replies(guard, prompts, said).figures("advbench")
        figures |= reply_metrics("advbench", said)
        return Result(figures, by_item, said)

    def _by_rule(self, texts: Sequence[str]) -> dict[str, list[bool]]:
        """Apply every phrase rule to every reply: rule name → one flag for each reply."""
        found: dict[str, list[bool]] = {name: [] for name in (*PHRASE_SETS, *self.rules)}
        for text in texts:
            # Built-in rules in one call, then the rules of a user's file.
            verdicts = harmless_by_set(text)
            for name in PHRASE_SETS:
                found[name].append(verdicts[name])
            for name, rule in self.rules.items():
                found[name].append(rule(text))
        return found

    def depends(self) -> dict[str, Any]:
        return {"judge": self.judge is not None}
