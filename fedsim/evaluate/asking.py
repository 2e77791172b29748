"""Benchmarks whose replies are generated together, so that one tail of long replies is waited for and not several."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Generic, TypeVar

from fedsim.generate.engine import Dialogues, Engine, Replies

T = TypeVar("T")


@dataclass(frozen=True)
class Asking(Generic[T]):
    """A benchmark before its replies are generated.

    Attributes:
        dialogues: what the model is asked.
        conclude: the benchmark's result, from the replies to each of them.
    """

    dialogues: Sequence[Dialogues]
    conclude: Callable[[list[Replies]], T]


def answer_all(engine: Engine, askings: Mapping[str, Asking[Any]]) -> dict[str, Any]:
    """The results by name; all replies are generated in one call of the engine."""
    replies = iter(engine.hold([kind for asking in askings.values() for kind in asking.dialogues]))
    parts = {name: list(islice(replies, len(asking.dialogues))) for name, asking in askings.items()}
    return {name: asking.conclude(parts[name]) for name, asking in askings.items()}


def answer(engine: Engine, asking: Asking[T]) -> T:
    """The result of a single benchmark."""
    result: T = answer_all(engine, {"": asking})[""]
    return result
