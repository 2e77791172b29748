"""The first session on a GPU: four calls that bring everything back in three files each.

``python -m tools.gpu CALL --out DIR [--commit HASH] [--parts a,b] [--limit-s S] [--dry-run]`` runs a call; without a
GPU or with --dry-run at micro sizes on the CPU, which proves nothing of CUDA. ``python -m tools.gpu take DIR`` puts
what calls brought back where it is committed. ``python -m tools.gpu reference`` makes the CPU's figures of the demo.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from fedsim.base.terminal import steady_terminal
from tools.gpu.calls import CALLS, chosen
from tools.gpu.session import ROOT, run_call, summary


@steady_terminal()
def main(arguments: Sequence[str]) -> int:
    """The command line; the exit status is 1 unless everything is ok."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.gpu",
        description=__doc__,
        epilog=f"calls:\n{summary()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("call", choices=[*CALLS, "take", "reference"], metavar="CALL", help="see below")
    parser.add_argument("folder", nargs="?", type=Path, metavar="DIR", help="take: where the results are")
    parser.add_argument("--out", type=Path, help="folder for the three files")
    parser.add_argument("--commit", help="hash of the commit that this tree is of, where it has no .git")
    parser.add_argument("--parts", default="", help="which, by name, separated by commas (all but extra ones)")
    parser.add_argument("--limit-s", type=float, help="seconds of the whole, shared out among the parts")
    parser.add_argument("--dry-run", action="store_true", help="micro sizes on the CPU")
    given = parser.parse_args(arguments)
    if given.call == "take":
        if given.folder is None:
            parser.error("take: name the folder with the results of the calls")
        from tools.gpu.take import take

        return take(given.folder)
    if given.folder is not None:
        parser.error(f"{given.call}: takes no folder; --out names the one for its results")
    if given.call == "reference":
        from tools.gpu.demo import write_reference  # the parts' modules are heavy

        with tempfile.TemporaryDirectory() as folder:
            write_reference(Path(folder))
        return 0
    if given.out is None:
        parser.error(f"{given.call}: needs --out, a folder for its results")
    if given.commit is not None:
        if re.fullmatch("[0-9a-f]{40}", given.commit) is None:
            parser.error(f"--commit {given.commit}: must be a whole hash of 40 hexadecimal digits")
        if (ROOT / ".git").exists():
            parser.error("--commit: this tree has a .git, which tells the commit; leave the argument out")
    elif not given.dry_run and not (ROOT / ".git").exists():
        parser.error("--commit: needed in a tree without .git, so that results say what they are of")
    try:
        parts = chosen(CALLS[given.call], given.parts)
    except ValueError as error:
        parser.error(f"--parts: {error}")
    return run_call(
        given.call, parts, given.out.resolve(), limit_s=given.limit_s, dry=given.dry_run, commit=given.commit
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
