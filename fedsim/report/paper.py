"""Published figures of "Responsible Federated Large Language Models" (arXiv 2502.16691).

Table 1 (safety and helpfulness of five methods under FedAvg and SCAFFOLD), Table 2 (the guard) and
the costs of §4.2 and §6.1. All on Llama-3.1-8B-Instruct with Llama Guard 3 on four A100 GPUs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from fedsim.extend import title

SOURCE = "arXiv 2502.16691"

Aggregation = Literal["fedavg", "scaffold"]

PRETRAINED = "pretrained"


@dataclass(frozen=True)
class SafetyRow:
    """One cell group of Table 1.

    Attributes:
        advbench_harmless: percent of 520 AdvBench replies that a phrase rule calls harmless.
        hhh_accuracy: percent of 438 HHH items answered right.
        mt_bench: mean GPT-4 rating of 80 two-turn questions, 1 to 10.
    """

    advbench_harmless: float
    hhh_accuracy: float
    mt_bench: float

    def shown(self, figure: str, absent: str = "") -> str:
        """Format a figure as printed; ``absent`` for one that the paper does not have."""
        if figure not in NUM_ITEMS:
            return absent
        return str(getattr(self, figure))


@dataclass(frozen=True)
class GuardRow:
    """One row of Table 2: the guard on SQuARe20K, in percent; positive = red."""

    accuracy: float
    precision: float
    recall: float
    hmean: float


#: Table 1, by aggregation and :func:`method_name`.
TABLE_1: dict[Aggregation, dict[str, SafetyRow]] = {
    "fedavg": {
        PRETRAINED: SafetyRow(99.6, 60.0, 6.8),
        "FL": SafetyRow(72.5, 49.3, 2.7),
        "FL + filter": SafetyRow(81.2, 51.8, 2.4),
        "FL + CAI": SafetyRow(96.2, 57.3, 5.8),
        "FL + filter + CAI": SafetyRow(96.3, 63.7, 6.1),
    },
    "scaffold": {
        PRETRAINED: SafetyRow(99.6, 60.0, 6.8),
        "FL": SafetyRow(72.7, 49.5, 2.9),
        "FL + filter": SafetyRow(78.8, 54.6, 2.7),
        "FL + CAI": SafetyRow(96.5, 62.6, 5.9),
        "FL + filter + CAI": SafetyRow(97.1, 63.9, 5.8),
    },
}

#: Items behind Table 1's columns (paper §5.2).
NUM_ADVBENCH, NUM_HHH, NUM_MT_BENCH = 520, 438, 80

#: The same by field of :class:`SafetyRow`.
NUM_ITEMS = {"advbench_harmless": NUM_ADVBENCH, "hhh_accuracy": NUM_HHH, "mt_bench": NUM_MT_BENCH}

#: Table 2. The fine-tuned row's own precision and recall give an accuracy of 75.2 at 30 % red;
#: 75.5 is printed.
TABLE_2: dict[str, GuardRow] = {
    "Llama Guard 3": GuardRow(70.1, 90.6, 0.5, 1.0),
    "fine-tuned Llama Guard 3": GuardRow(75.5, 56.7, 73.7, 64.1),
}

#: Red share of SQuARe20K, on which Table 2 was measured (paper §5.1).
RED_SHARE = 0.3


@dataclass(frozen=True)
class Cost:
    """Elapsed time of one stage.

    Attributes:
        minutes: from its start to its end.
        num_gpus: A100 GPUs that it ran on.
        what: the work, in words.
    """

    minutes: float
    num_gpus: int
    what: str


#: Rows of a batch, local and CAI alike; rounds; rows of S-CAI20K; CAI iterations of a round
#: (paper §4.2, §5.1, §5.2).
BATCH_SIZE, NUM_ROUNDS, NUM_CAI_ROWS, CAI_ITERATIONS = 16, 50, 20_000, 50

#: Clients, those of a round, and their optimizer steps in it (paper §5.1, §5.2).
NUM_CLIENTS, CLIENTS_PER_ROUND, LOCAL_STEPS = 20, 5, 25

#: Iterations of an epoch of CAI, which the paper does not print: S-CAI20K in batches.
CAI_EPOCH_ITERATIONS = NUM_CAI_ROWS // BATCH_SIZE

#: Paper §4.2 (CAI per round and epoch) and §6.1 (the others).
COSTS: dict[str, Cost] = {
    "fedavg": Cost(140, 4, "50 rounds of FedAvg: 5 clients a round, 25 steps of 16 rows each"),
    "scaffold": Cost(230, 4, "50 rounds of SCAFFOLD, the same work"),
    "cai": Cost(160, 4, "CAI in all 50 rounds, 50 iterations each"),
    "cai_round": Cost(3.2, 4, "CAI in one round, 50 iterations"),
    "cai_epoch": Cost(80, 4, "one epoch of CAI, which the 50 iterations replace (-96 %)"),
    "guard_tuning": Cost(60, 4, "fine-tuning Llama Guard 3, 5 epochs on 20,000 rows"),
    "guard_1000_rows": Cost(1, 1, "filtering 1,000 rows"),
}


#: Ending of a filter's name by ``guard.action``; the paper's own filter drops rows.
ACTION_WORDS = {"drop": "", "refuse": " that refuses", "downweight": " that downweights"}


def method_name(filtered: bool, cai: bool) -> str:
    """Return the paper's name of a method, such as ``FL + filter + CAI``; ``FL`` without both."""
    name = "FL"
    if filtered:
        name += " + filter"
    if cai:
        name += " + CAI"
    return name


def method_of(config: Mapping[str, Any]) -> str:
    """Name a configuration's method.

    The name is one of :func:`method_name` only where the paper ran the same: its filter is a guard
    model that is fine-tuned and drops rows (§4.1), its CAI follows every round (§4.2), and no
    client attacks.

    Args:
        config: dotted key → value.
    """
    name = "FL"
    # The filter.
    kind = config["guard.kind"]
    if kind == "llama_guard":
        name += " + untuned filter" if config["guard.tune_epochs"] == 0 else " + filter"
    elif kind != "none":
        name += f" + {title('guard.kind', kind)} filter"
    if kind != "none":
        name += ACTION_WORDS[config["guard.action"]]
    # CAI.
    if config["cai.iterations"] != 0:
        every = config["cai.every"]
        schedules = {0: "post-hoc CAI", 1: "CAI"}
        name += f" + {schedules.get(every, f'CAI every {every} rounds')}"
    # The attacks.
    attacks = []
    for attack in config.get("attacks", ()):
        attacks.append(f"{100 * attack['share']:g} % {title('attacks.kind', attack['kind'])}")
    if attacks:
        name += f" under {' and '.join(attacks)}"
    return name


def algorithm_name(algorithm: str) -> str:
    """Title of a value of ``federation.algorithm``, such as ``FedAvg``."""
    return title("federation.algorithm", algorithm)


def arm_name(algorithm: str, method: str) -> str:
    """Aggregation and method, such as ``FedAvg, FL + filter + CAI``."""
    return f"{algorithm_name(algorithm)}, {method}"


def arm_of(config: Mapping[str, Any]) -> str:
    """:func:`arm_name` of a configuration, dotted key → value."""
    return arm_name(config["federation.algorithm"], method_of(config))


def paper_row(algorithm: str, method: str) -> SafetyRow | None:
    """Return Table 1's row of an arm; None for one that the paper did not run."""
    for known, table in TABLE_1.items():
        if known == algorithm:
            return table.get(method)
    return None
