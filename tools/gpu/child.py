"""Runs one part of a call; started by :mod:`tools.gpu.session`, which ends it when its time is up."""

from __future__ import annotations

from tools.gpu import without

without.hide_as_told()  # before anything else is imported

import argparse  # noqa: E402
import importlib  # noqa: E402
import sys  # noqa: E402
from collections.abc import Sequence  # noqa: E402
from pathlib import Path  # noqa: E402

import torch  # noqa: E402

from fedsim.attention.backends import leave_out_cudnn  # noqa: E402
from fedsim.base.terminal import steady_terminal  # noqa: E402
from fedsim.parallel.device import set_allocator  # noqa: E402
from tools.bench.stage import LeftOut  # noqa: E402
from tools.gpu.calls import CALLS  # noqa: E402
from tools.gpu.report import Report, Setting  # noqa: E402


@steady_terminal()
def main(arguments: Sequence[str]) -> int:
    """Run the part; what it raises is its last line."""
    parser = argparse.ArgumentParser(prog="python -m tools.gpu.child")
    parser.add_argument("call", choices=CALLS)
    parser.add_argument("part")
    parser.add_argument("--work", type=Path, required=True, help="for lines, files to keep and other files")
    parser.add_argument("--ends-at", type=float, required=True, help="time.monotonic() of the end")
    parser.add_argument("--commit")
    parser.add_argument("--dry-run", action="store_true")
    given = parser.parse_args(arguments)
    part = CALLS[given.call].parts[given.part]
    is_cuda = torch.cuda.is_available() and not given.dry_run
    device = torch.device("cuda", 0) if is_cuda else torch.device("cpu")
    if is_cuda:
        set_allocator()
    leave_out_cudnn()  # holds for references and peers too
    torch.set_num_threads(1)
    folder = given.work / "scratch"
    folder.mkdir()
    setting = Setting(device, not is_cuda, folder, given.work / "keep", given.ends_at, given.commit)
    report = Report(given.part, given.work / "lines")
    try:
        module = importlib.import_module(f"tools.gpu.{part.module}")
        module.run(setting, report, *([part.argument] if part.argument else []))
    except LeftOut as why:
        report.leave_out("the whole part", str(why))
    loaded = [name for name in without.PACKAGES if name in sys.modules]
    report.figure("packages that need not be there, and were loaded", loaded)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
