"""Enters what a GPU has shown right into ``kernels/proved.json``, from which ``auto`` settings take their leave."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fedsim.proved import LIST, Proof, proofs
from tools.bench.rows import Correctness


class Refused(Exception):
    """Why what was shown right is not entered."""


def enter(checks: Sequence[Correctness], facts: Mapping[str, Any], row: str, path: Path = LIST) -> list[str]:
    """Write an entry for each CUDA path of which all checks have passed, in place of an older one of that path.

    Args:
        checks: a stage's.
        facts: where and with what they were made.
        row: file of the stage's rows, relative to the repository's root.

    Returns:
        The paths.

    Raises:
        Refused: there is something to enter, but not what was compared: the commit is unknown, or files were changed.
    """
    worst: dict[str, float] = {}
    failed = {check.proves for check in checks if not check.passed}
    for check in checks:
        if check.proves and check.proves not in failed:
            worst[check.proves] = max(worst.get(check.proves, 0.0), check.error)
    if worst:
        commit = facts["commit"]
        if commit is None:
            raise Refused(f"{', '.join(sorted(worst))}: the commit is unknown; name it with --commit")
        if "dirty" in commit:
            raise Refused(f"{', '.join(sorted(worst))}: files differ from commit {commit}; commit them first")
        kept = [proof for proof in proofs() if proof.path not in worst]
        new = [
            Proof(name, facts["device"], facts["versions"]["torch"], facts["date"][:10], commit, error, row)
            for name, error in worst.items()
        ]
        entries = [asdict(proof) for proof in sorted([*kept, *new], key=lambda proof: proof.path)]
        path.write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")
        proofs.cache_clear()
    return sorted(worst)
