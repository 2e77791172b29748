"""The ``VERSION`` of each artefact kind: a change of results without a new version fails here.

A tiny run makes one artefact of each kind. What it holds is compared with ``golden_artefacts.json``, where the same
version has recorded it. After a wanted change of results, raise the ``VERSION`` that the failing test names and record
the new content::

    python tests/test_artefact_versions.py
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest
from safetensors.torch import load_file

from fedsim import world
from fedsim.config import load_config
from fedsim.data.square import from_arrow
from fedsim.parallel.world import process_world
from fedsim.run import prepare, pretrained
from fedsim.run.simulation import Simulation
from fedsim.safety import cai_stage, filter_stage, guard_model

GOLDEN: Final = Path(__file__).with_name("golden_artefacts.json")
SMALL: Final = Path(__file__).parent / "distributed" / "small.yaml"
RUN: Final = ["federation.num_rounds=1", "local.steps=1", "cai.iterations=1", "eval.guard_judge=none",
              "record.texts=false", "parallel.threads=1"]  # fmt: skip

# Relative. Measured: another attention backend, whose sums have another order, changes a figure of the adapter by
# 6e-5 at most; a halved gradient, which AdamW nearly hides, by 2e-3.
TOLERANCE: Final = 3e-4

Content = dict[str, Any]
"""Numbers and digests of texts by name."""


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _adapter(folder: Path) -> Content:
    """Norm of each tensor, and its sum, whose terms have both signs."""
    tensors = load_file(folder / "adapter_model.safetensors")
    norms = {f"{name}, norm": float(tensor.double().norm()) for name, tensor in tensors.items()}
    return norms | {f"{name}, sum": float(tensor.double().sum()) for name, tensor in tensors.items()}


def _verdicts(folder: Path) -> Content:
    scores = json.loads((folder / "verdicts.json").read_text(encoding="utf-8"))
    return {f"row {i}, probability": prob for i, (prob, _) in enumerate(scores)}


def _conversations(folder: Path) -> Content:
    lines = (folder / "conversations.jsonl").read_text(encoding="utf-8").splitlines()
    return {f"conversation {i}": _sha256(line) for i, line in enumerate(lines)}


def _evaluation(folder: Path) -> Content:
    found = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    replies = json.dumps([[reply["text"] for reply in answer["replies"]] for answer in found["answers"]])
    return {**dict(found["metrics"]), "replies": _sha256(replies)}


def _rows(folder: Path) -> Content:
    table = from_arrow(folder / "rows.arrow")
    return {"rows": _sha256(repr(table.take(list(range(len(table))))))}


def _file(folder: Path) -> Content:
    return {p.name: _sha256(p.read_text(encoding="utf-8")) for p in folder.iterdir() if p.name != "artefact.json"}


KINDS: Final[dict[str, tuple[str, int, Callable[[Path], Content]]]] = {
    "guard-adapter": ("fedsim.safety.guard_model.VERSION", guard_model.VERSION, _adapter),
    "guard-verdicts": ("fedsim.safety.filter_stage.VERSION", filter_stage.VERSION, _verdicts),
    "cai-conversations": ("fedsim.safety.cai_stage.VERSION", cai_stage.VERSION, _conversations),
    "pretrained-evaluation": ("fedsim.run.pretrained.VERSION", pretrained.VERSION, _evaluation),
    "square-rows": ("fedsim.run.prepare.ROWS_VERSION", prepare.ROWS_VERSION, _rows),
    **{
        f"world-{name}": ("fedsim.world.VERSION", world.VERSION, _file)
        for name in ("square", "advbench", "hhh", "mt-bench", "xstest", "helpful")
    },
}
"""Where the version of a kind stands, the version, and what is compared of its folder."""


def make_artefacts(folder: Path) -> dict[str, Path]:
    """The artefact folders of a tiny run on one process, by kind."""
    words = [*RUN, f"record.dir={folder / 'runs'}", f"record.artefacts={folder / 'artefacts'}"]
    config = load_config(SMALL, words)
    with process_world(exact=True, threads=1, timeout_s=60, device="cpu") as here:
        Simulation(config, here).run()
    return {path.name.rpartition("-")[0]: path for path in (folder / "artefacts").iterdir() if path.is_dir()}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_artefacts(tmp_path_factory.mktemp("artefacts"))


def test_every_kind_has_a_version(made: dict[str, Path]) -> None:
    assert made.keys() == KINDS.keys() == json.loads(GOLDEN.read_text(encoding="utf-8")).keys()


@pytest.mark.parametrize("kind", KINDS)
def test_results_change_with_their_version_alone(made: dict[str, Path], kind: str) -> None:
    where, version, content = KINDS[kind]
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))[kind]
    note = json.loads((made[kind] / "artefact.json").read_text(encoding="utf-8"))
    assert note["depends"]["version"] == version, "the version is part of the artefact's key"
    assert golden["version"] == version, "record the new version's content: python tests/test_artefact_versions.py"
    found, wanted = content(made[kind]), golden["content"]
    assert found.keys() == wanted.keys(), f"{kind} has changed: raise {where}"
    other = [name for name, value in wanted.items() if not equal(found[name], value)]
    assert other == [], f"{kind} has changed: raise {where}"


def equal(found: float | str, wanted: float | str) -> bool:
    """Texts to the letter, numbers within the tolerance."""
    if isinstance(wanted, str):
        return found == wanted
    return bool(found == pytest.approx(wanted, rel=TOLERANCE, abs=1e-9, nan_ok=True))


def record() -> None:
    """Write the golden file."""
    with tempfile.TemporaryDirectory() as folder:
        folders = make_artefacts(Path(folder))
        golden = {
            kind: {"version": version, "content": content(folders[kind])}
            for kind, (_, version, content) in sorted(KINDS.items())
        }
    GOLDEN.write_text(json.dumps(golden, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    record()
