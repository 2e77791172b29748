"""The entry point in this very process, as a worker of the pool runs it."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run_entry(words: list[str]) -> tuple[int, str]:
    """``launch/run.py`` with these words: its exit code, and what went to standard error."""
    spec = importlib.util.spec_from_file_location("launch_run", ROOT / "launch" / "run.py")
    assert spec is not None and spec.loader is not None
    entry = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(entry)
    shown = io.StringIO()
    arguments, sys.argv = sys.argv, ["launch/run.py", *words]
    try:
        with contextlib.redirect_stderr(shown), contextlib.redirect_stdout(io.StringIO()):
            code = entry.main()
    except SystemExit as ended:
        code = int(ended.code or 0)
    finally:
        sys.argv = arguments
    return code, shown.getvalue()
