"""Checks that the finished runs of a study pair, and their outcomes by seed and item."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np

from fedsim.base.errors import DataError
from fedsim.config import code_names, code_role, file_roles, model_roles, to_flat
from fedsim.evaluate.own import OWN
from fedsim.record.groups import differing, shown_value
from fedsim.report.finished import FinishedRun

MEASURED: Final = tuple(OWN)
"""Roles of the files, in a manifest, that all runs of a study are measured on."""


def check_paired(arms: Sequence[Sequence[FinishedRun]]) -> None:
    """Refuse arms that do not pair: other seeds, unlike runs in an arm, or files that changed between the runs.

    Raises:
        DataError: they cannot be compared item by item; the message names the runs.
    """
    first, files = arms[0], dict[str, tuple[str, Path]]()
    for outcomes in arms:
        check_alike(outcomes)
        seeds, expected = ([outcome.config.seed for outcome in arm] for arm in (outcomes, first))
        if seeds != expected:
            raise DataError(
                f"{outcomes[0].folder}: its arm has the seeds {seeds}, that of {first[0].folder} has {expected}; run "
                "all arms with the same seeds"
            )
        for outcome in outcomes:
            _check_files(outcome, files)


def check_alike(outcomes: Sequence[FinishedRun]) -> None:
    """Refuse to put runs together that differ in more than seed and place, or have a seed twice.

    Raises:
        DataError: names two runs and the keys in which they differ.
    """
    first, by_seed = outcomes[0], dict[int, Path]()
    for outcome in outcomes:
        seed = outcome.config.seed
        if seed in by_seed:
            raise DataError(f"{outcome.folder} and {by_seed[seed]}: both have seed {seed}; take one of them")
        by_seed[seed] = outcome.folder
        both = [first.settings, outcome.settings]
        if keys := differing(both):
            words = []
            for key in keys[:5]:
                words.append(f"{key}: {shown_value(key, both[0], both)} and {shown_value(key, both[1], both)}")
            raise DataError(
                f"{first.folder} and {outcome.folder}: are no seeds of one arm, as they differ in "
                f"{'; '.join(words)}; remove the one that is not meant, and start the command again"
            )


def _check_files(outcome: FinishedRun, known: dict[str, tuple[str, Path]]) -> None:
    """Compare a run's files with those of the runs before it, by role and by the path that the configuration has.

    Args:
        known: key and path → SHA-256 and the run that has it; this run's are added.
    """
    config = to_flat(outcome.config)
    files = outcome.manifest.get("inputs", {})

    def check(place: str, role: str, sha256: str) -> None:
        """Compare with the first run that had a file in this place."""
        digest, other = known.setdefault(place, (sha256, outcome.folder))
        if digest != sha256:
            raise DataError(
                f"{outcome.folder}: had another {role} file than {other}; remove one of the two runs and start the "
                "command again"
            )

    # A user's own code, by the name that the configuration has.
    for key, (_, name) in code_names(config).items():
        role = code_role(key)
        if role in files:
            check(f"{role} {name}", role, files[role]["sha256"])

    # Data files and models.
    for key, role in {**file_roles(), **model_roles()}.items():
        content = outcome.settings[key]
        # An embedded corpus has the size that the splits ask for, which a sweep may vary.
        if content is None or (content.embedded and role not in MEASURED):
            continue
        place = role if role in MEASURED else f"{role} {config[key]}"
        check(place, role, content.sha256)


def sample(outcomes: Sequence[FinishedRun], point: str, name: str, scale: float = 1.0) -> np.ndarray | None:
    """One arm's outcomes over its seeds, fp64 ``[num_seeds, num_items]``, times ``scale``.

    A figure that no item file holds, such as a judge's score, counts as one item: its seeds alone are draws then.

    Args:
        outcomes: runs of one arm, in the order of their seeds.
        point: as in the metric rows; ``final`` stands for the model that the run ended with.

    Returns:
        None if some run lacks the figure.

    Raises:
        DataError: the runs were measured on different numbers of items.
    """
    columns = []
    for outcome in outcomes:
        at = outcome.final_point if point == "final" else point
        values = outcome.items(at, name)
        if values is None:
            single = outcome.figure(at, name)
            if single is None:
                return None
            values = np.array([single / scale])
        columns.append(values)
    if len({len(column) for column in columns}) > 1:
        raise DataError(
            f"{outcomes[0].folder.parent}: the runs of an arm have {sorted({len(c) for c in columns})} items of "
            f"{name}; run all seeds on the same benchmark files"
        )
    return scale * np.stack(columns)
