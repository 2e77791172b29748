"""Known vulnerabilities of the pinned versions, by pip-audit: `make audit`.

Usage: python tools/audit.py [CONSTRAINTS.txt] [pip-audit's own options, such as -s osv]

Asks a vulnerability service (PyPI's by default) about every version of the file, and nothing else of this machine. A
package that the service does not answer for counts as not audited, never as sound: pip-audit alone would say "No known
vulnerabilities found". The exit status is 0 only if every version was audited and none has a known vulnerability; it is
1 where one has, and 2 where some could not be audited.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
LIMIT_S = 600.0
"""Longest wait for the service, over all packages."""


@dataclass(frozen=True)
class Audit:
    """What the service said.

    Attributes:
        num_audited: versions that it answered for.
        vulnerable: ``name version: id (fixed in …)`` of each known vulnerability.
        skipped: why each other version was not audited.
    """

    num_audited: int
    vulnerable: tuple[str, ...]
    skipped: tuple[str, ...]

    @property
    def status(self) -> int:
        """Exit status."""
        return 1 if self.vulnerable else 2 if self.skipped or self.num_audited == 0 else 0

    def text(self) -> str:
        """The lines to show."""
        lines = [f"{self.num_audited} versions audited, {len(self.vulnerable)} known vulnerabilities"]
        lines += [f"  {line}" for line in self.vulnerable]
        if self.skipped:
            lines.append(f"{len(self.skipped)} versions NOT audited, so nothing is known of them; the first:")
            lines.append(f"  {self.skipped[0]}")
        return "\n".join(lines)


def read_report(report: Any) -> Audit:
    """pip-audit's JSON.

    Raises:
        KeyError, TypeError: it is of another form.
    """
    vulnerable, skipped, num_audited = [], [], 0
    for package in report["dependencies"]:
        if "skip_reason" in package:
            skipped.append(str(package["skip_reason"]))
            continue
        num_audited += 1
        for found in package["vulns"]:
            fixed = ", ".join(found["fix_versions"]) or "no version yet"
            vulnerable.append(f"{package['name']} {package['version']}: {found['id']} (fixed in {fixed})")
    return Audit(num_audited, tuple(vulnerable), tuple(skipped))


def main(arguments: Sequence[str]) -> int:
    """Audit and show; returns the exit status."""
    named = [word for word in arguments[:1] if not word.startswith("-")]
    constraints = named[0] if named else str(ROOT / "constraints.txt")
    command = [sys.executable, "-m", "pip_audit", "-r", constraints, "--no-deps", "--disable-pip", "-f", "json"]
    command += ["--progress-spinner", "off", *arguments[len(named) :]]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        return fail(f"the vulnerability service has not answered in {LIMIT_S:g} s; try again, or another one (-s osv)")
    try:
        audit = read_report(json.loads(done.stdout))
    except (ValueError, KeyError, TypeError):
        last = (done.stderr.strip().splitlines() or [f"pip-audit ended with status {done.returncode}"])[-1]
        return fail(
            f"nothing was audited: {last[:300]} (the vulnerability service must be reached: PyPI's by default; make "
            "audit installs pip-audit)"
        )
    print(audit.text())
    if audit.status == 2:
        return fail(
            "not all versions were audited: the vulnerability service cannot be reached from here, or knows them not"
        )
    return audit.status


def fail(message: str) -> int:
    """One line; returns the exit status 2."""
    print(f"error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
