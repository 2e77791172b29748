"""Record of a session's end, ``exit.json`` in the run directory; a killed session leaves none."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from fedsim.base.journal import Place
from fedsim.base.json_text import parse_json
from fedsim.base.version import made_by

Reason = Literal["finished", "stopped", "error", "lost rank"]

EXIT_FILE = "exit.json"


def write_ending(folder: Path, reason: Reason, status: int, message: str, place: Place) -> bool:
    """Write ``exit.json``, unless another process has: the first one names the cause.

    Args:
        folder: the run directory.
        status: the process's exit status.
        message: for people.
        place: where it happened, with the rank.

    Returns:
        False if there was one.
    """
    note = {
        "reason": reason,
        "status": status,
        "message": message,
        **place,
        "utc": datetime.now(UTC).isoformat(timespec="seconds"),
        **made_by(),
    }
    text, partial = (
        json.dumps(note, indent=2, ensure_ascii=False) + "\n",
        folder / f".{EXIT_FILE}.{os.getpid()}",
    )
    try:
        partial.write_text(text, encoding="utf-8")
        try:
            os.link(partial, folder / EXIT_FILE)  # unlike a rename, it does not replace
        except FileExistsError:
            return False
        except OSError:  # a file system without links
            with (folder / EXIT_FILE).open("x", encoding="utf-8") as file:
                file.write(text)
    except FileExistsError:  # by the exclusive open
        return False
    except OSError:  # such as a full disk: only the terminal shows the cause
        pass
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
    return True


def read_ending(folder: Path) -> dict[str, Any] | None:
    """Read the note of the last session; None if it still runs or was killed."""
    try:
        note = parse_json((folder / EXIT_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(note, dict):
        return None
    return note


def forget_ending(folder: Path) -> None:
    """Delete the note of an earlier session, as a new one begins."""
    (folder / EXIT_FILE).unlink(missing_ok=True)
