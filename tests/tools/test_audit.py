"""The audit of pinned versions: silence is no soundness, and each outcome has its exit status."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tools.audit import read_report

ROOT = Path(__file__).parents[2]
SOUND = {"name": "a", "version": "1", "vulns": []}
FOUND = [{"id": "X-1", "fix_versions": ["2.1", "3"]}, {"id": "X-2", "fix_versions": []}]
KNOWN = {"name": "b", "version": "2", "vulns": FOUND}
UNKNOWN = {"name": "c", "skip_reason": "could not be audited: c (3)"}


@pytest.mark.parametrize(
    ("packages", "status", "num_audited"),
    [
        ([SOUND], 0, 1),
        ([SOUND, KNOWN], 1, 2),
        ([SOUND, UNKNOWN], 2, 1),
        ([KNOWN, UNKNOWN], 1, 1),
        ([UNKNOWN], 2, 0),
        ([], 2, 0),
    ],
)
def test_only_what_was_audited_and_is_sound_passes(packages: list[Any], status: int, num_audited: int) -> None:
    audit = read_report({"dependencies": packages})
    assert (audit.status, audit.num_audited) == (status, num_audited)
    text = audit.text()
    assert ("b 2: X-1 (fixed in 2.1, 3)" in text and "b 2: X-2 (fixed in no version yet)" in text) == (
        KNOWN in packages
    )
    assert ("NOT audited" in text and "could not be audited: c (3)" in text) == (UNKNOWN in packages)


def audit(folder: Path, script: str) -> subprocess.CompletedProcess[str]:
    """The tool with a pip-audit that does what the script says."""
    (folder / "pip_audit.py").write_text(f"import sys\n{script}", encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}
    command = [sys.executable, str(ROOT / "tools" / "audit.py"), "-s", "osv"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


def test_the_pinned_versions_are_asked_for(tmp_path: Path) -> None:
    asked = tmp_path / "asked"
    report = json.dumps({"dependencies": [SOUND]})
    done = audit(tmp_path, f"open({str(asked)!r}, 'w').write(' '.join(sys.argv[1:]))\nprint({report!r})")
    assert (done.returncode, done.stdout, done.stderr) == (0, "1 versions audited, 0 known vulnerabilities\n", "")
    words = asked.read_text().split()
    assert words[:2] == ["-r", str(ROOT / "constraints.txt")] and words[-2:] == ["-s", "osv"]


@pytest.mark.parametrize(
    ("script", "part"),
    [
        ("sys.exit('ConnectionError: no route to the service')", "no route to the service"),
        ("sys.exit(3)", "ended with status 3"),
        ("print('[]')", "nothing was audited"),
        (f"print({json.dumps({'dependencies': [UNKNOWN]})!r})", "not all versions were audited"),
    ],
)
def test_a_service_that_is_not_reached_is_one_line(tmp_path: Path, script: str, part: str) -> None:
    done = audit(tmp_path, script)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and part in line
