"""Everything that a run decided, by what it is, to compare two runs part by part; texts only as hashes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from fedsim.base.artefacts import file_digest
from fedsim.record.metrics import decided_rows, read_rows

#: Parts of :func:`outcome`, in the order in which a run makes them.
PARTS = ("artefacts", "rows", "client_state", "client_rounds", "last", "state", "adapter", "replies", "answers")


def outcome(run: Path, artefacts: Path) -> dict[str, Any]:
    """The parts of a finished run.

    Args:
        run: its directory.
        artefacts: the folder of its artefacts, used by no other run.
    """
    last = sorted((run / "checkpoints").iterdir())[-1]
    answers = {}
    for path in sorted((run / "answers" / "mt_bench" / "model_answer").glob("*.jsonl")):
        turns = [json.loads(line)["choices"] for line in path.read_text(encoding="utf-8").splitlines()]
        answers[path.name] = hashlib.sha256(json.dumps(turns).encode()).hexdigest()
    return {
        "rows": [json.dumps(row) for row in decided_rows(read_rows(run / "metrics.jsonl"))],
        "adapter": file_digest(run / "adapter" / "adapter_model.safetensors"),
        "state": file_digest(last / "state.safetensors"),
        "last": last.name,
        "client_rounds": json.loads((last / "checkpoint.json").read_text(encoding="utf-8"))["client_rounds"],
        "client_state": {p.name: file_digest(p) for p in sorted((run / "client_state").iterdir())},
        "replies": {p.name: file_digest(p) for p in sorted((run / "answers").glob("*-round*.json"))},
        "answers": answers,
        "artefacts": {str(p.relative_to(artefacts)): file_digest(p) for p in artefacts.rglob("*") if _is_content(p)},
    }


def _is_content(path: Path) -> bool:
    """``artefact.json`` holds digests of the others, and the commit that wrote them."""
    return path.is_file() and path.name != "artefact.json"


def different(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """The parts that differ, the first stage first."""
    return [part for part in PARTS if found[part] != wanted[part]]
