"""Puts what calls brought back where it is committed: rows of the benchmark, and each call's own file."""

from __future__ import annotations

import json
import sys
import tarfile
from pathlib import Path, PurePosixPath
from typing import Any, Final

from tools.bench.run import RESULTS as ROWS
from tools.bench.run import slug
from tools.gpu.calls import CALLS

RESULTS: Final = Path(__file__).with_name("results")
NEXT: Final = "python tools/bench/page.py && fedsim costs --page"


def take(folder: Path, rows: Path = ROWS, results: Path = RESULTS) -> int:
    """Copy from a folder, which may be read-only; the exit status.

    Args:
        folder: with the files of one or more calls, at any depth.
        rows: folder of the benchmark's rows, by device.
        results: folder of the calls' files, by device.
    """
    calls = sorted(path for path in folder.rglob("*.json") if path.stem in CALLS)
    if not calls:
        print(f"{folder}: holds no {', '.join(f'{name}.json' for name in CALLS)}; give the folder that --out named",
              file=sys.stderr)  # fmt: skip
        return 2
    for path in calls:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if (why := refusal(found)) is not None:
            print(f"{path}: {why}", file=sys.stderr)
            return 2
    for path in calls:
        found = json.loads(path.read_text(encoding="utf-8"))
        place = results / slug(found["device"]) / path.name
        _write(place, path.read_bytes())
        archive = path.with_name(f"{path.stem}.tar.gz")
        if archive.is_file():
            _take_rows(archive, rows)
    print(f"then: {NEXT}")
    return 0


def refusal(found: dict[str, Any]) -> str | None:
    """Why a call's results are not to be committed; None if nothing is against it."""
    if found["dry_run"]:
        return "of a dry run on a CPU; nothing of it is a measurement"
    if not found["commit"]:
        return "does not say of which commit it is; make the call with --commit"
    return None


def _take_rows(archive: Path, rows: Path) -> None:
    """Write the rows of an archive, ``PART/rows/DEVICE/STAGE.json``, each under its device."""
    with tarfile.open(archive) as content:
        for member in content.getmembers():
            parts = PurePosixPath(member.name).parts
            file = content.extractfile(member) if member.isfile() else None
            if file is None or len(parts) != 4 or parts[1] != "rows" or ".." in parts:
                continue
            _write(rows / parts[2] / parts[3], file.read())


def _write(place: Path, content: bytes) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(content)
    print(place)
