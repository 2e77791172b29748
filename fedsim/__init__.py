"""fedsim: a single-node, multi-GPU simulation engine for responsible federated LLMs (arXiv 2502.16691).

``simulate`` runs one from Python; the other names are what a user's own file derives from (docs/extend.md).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from fedsim.api import Result, simulate
    from fedsim.base.errors import DataError, JudgeError
    from fedsim.base.figures import Figure
    from fedsim.data.square import SquareRow
    from fedsim.evaluate.benchmark import Benchmark
    from fedsim.evaluate.confusion import Verdict
    from fedsim.evaluate.judge_contract import Judge
    from fedsim.federation.algorithms import (
        Algorithm,
        ClientOutcome,
        Correction,
        FedAvg,
        RoundSums,
        ServerState,
        Updates,
    )
    from fedsim.federation.attacks import Attack
    from fedsim.generate.engine import Dialogues, Sampling
    from fedsim.safety.guard import Guard

_PLACES = {
    "Algorithm": "fedsim.federation.algorithms",
    "Attack": "fedsim.federation.attacks",
    "Benchmark": "fedsim.evaluate.benchmark",
    "ClientOutcome": "fedsim.federation.algorithms",
    "Correction": "fedsim.federation.algorithms",
    "DataError": "fedsim.base.errors",
    "Dialogues": "fedsim.generate.engine",
    "FedAvg": "fedsim.federation.algorithms",
    "Figure": "fedsim.base.figures",
    "Guard": "fedsim.safety.guard",
    "Judge": "fedsim.evaluate.judge_contract",
    "JudgeError": "fedsim.base.errors",
    "Result": "fedsim.api",
    "RoundSums": "fedsim.federation.algorithms",
    "Sampling": "fedsim.generate.engine",
    "ServerState": "fedsim.federation.algorithms",
    "SquareRow": "fedsim.data.square",
    "Updates": "fedsim.federation.algorithms",
    "Verdict": "fedsim.evaluate.confusion",
    "simulate": "fedsim.api",
}
"""Where each public name lies; loaded when it is first asked for, so that ``import fedsim`` takes no time."""

__all__ = [
    "Algorithm",
    "Attack",
    "Benchmark",
    "ClientOutcome",
    "Correction",
    "DataError",
    "Dialogues",
    "FedAvg",
    "Figure",
    "Guard",
    "Judge",
    "JudgeError",
    "Result",
    "RoundSums",
    "Sampling",
    "ServerState",
    "SquareRow",
    "Updates",
    "Verdict",
    "simulate",
]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from fedsim.base.user_code import load_target

    return load_target(f"{_PLACES[name]}:{name}")
