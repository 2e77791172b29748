"""Pages under docs/results/ equal what their tools write from the committed rows; no figure is typed elsewhere."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

import tools.bench.page
import tools.chaos.run
import tools.demo_page
import tools.exact_cost
import tools.rehearsal.__main__
import tools.soak
import tools.sources_page
from fedsim.commands import costs, sweep, table1, table2
from fedsim.study.grid import read_sweep
from fedsim.study.seed_rows import read_seed_rows
from fedsim.study.table1 import TableOne
from fedsim.study.table1_words import arm_table
from tools.sources_page import page as sources

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"
SWEEPS = sorted((ROOT / "configs" / "sweeps").glob("*.yaml"))


def costs_page() -> str:
    """The page of costs by the preferred rows, without runs."""
    work = costs.paper_work()
    return costs.page(costs.projected_report(work), work, None)


def chaos() -> str:
    """The page of kills."""
    return tools.chaos.run.page(json.loads(tools.chaos.run.RESULT.read_text(encoding="utf-8")))


def rehearsal() -> str:
    """The page of the rehearsal."""
    from tools.rehearsal import table

    return table.page(json.loads(tools.rehearsal.__main__.RESULT.read_text(encoding="utf-8")))


def sweep_page(path: Path) -> Callable[[], str]:
    """What makes a sweep's page."""
    return lambda: sweep.page(RESULTS, read_sweep(path, "quick"))


PAGES: dict[str, tuple[Callable[[], str], str]] = {
    "table1.md": (lambda: table1.page(RESULTS), "fedsim table1 --page"),
    "table2.md": (lambda: table2.page(RESULTS), "fedsim table2 --page"),
    "demo.md": (lambda: tools.demo_page.page(tools.demo_page.committed()), "python tools/demo_page.py"),
    "benchmark.md": (tools.bench.page.page, "python tools/bench/page.py"),
    "costs.md": (costs_page, "fedsim costs --page"),
    "exact-cost.md": (tools.exact_cost.page, "python tools/exact_cost.py --page"),
    "soak.md": (tools.soak.page, "python tools/soak.py --page"),
    "chaos.md": (chaos, "python tools/chaos/run.py --publish"),
    "rehearsal.md": (rehearsal, "python -m tools.rehearsal --page"),
    "sources.md": (sources, "python tools/sources_page.py"),
    **{f"sweep-{path.stem}.md": (sweep_page(path), f"fedsim sweep {path.name} --page") for path in SWEEPS},
}
"""What makes each page from the committed rows, and the command that writes it."""


@pytest.mark.parametrize("name", PAGES)
def test_a_result_page_is_that_of_the_committed_rows(name: str) -> None:
    make, command = PAGES[name]
    assert (RESULTS / name).read_text(encoding="utf-8") == make(), f"run: {command}"


def test_every_result_page_is_held_by_a_test() -> None:
    assert {path.name for path in RESULTS.glob("*.md")} == PAGES.keys()


PAGE_TOOLS = [tools.bench.page, tools.demo_page, tools.sources_page]


@pytest.mark.parametrize("tool", PAGE_TOOLS, ids=lambda tool: tool.__name__)
def test_a_tool_that_is_asked_for_help_writes_nothing(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tool, "write", lambda _: pytest.fail("it wrote"))
    with pytest.raises(SystemExit) as left:
        tool.main(["--help"])
    assert left.value.code == 0
    assert f"usage: {tool.__name__.replace('.', '/')}.py" in capsys.readouterr().out
    assert tool.main(["--nonsense"]) == 2


def test_the_demos_tool_names_a_folder_that_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tools.demo_page.main([str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        f"error: {tmp_path}: holds no config.yaml; give the directory of a finished run, such as runs/demo\n"
    )


def test_no_figure_of_the_embedded_world_stands_in_a_hand_written_page() -> None:
    """Intervals and verdicts come from rows; the README's one table is compared with them below."""
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        text = page.read_text(encoding="utf-8")
        assert "<!-- " not in text.replace("<!-- extend -->", ""), f"{page}: a mark of a generated block"
        assert "reproduced" not in text.replace("*reproduced in the embedded world*", ""), page
        assert not re.search(r"\d\.\d+ \[", text), f"{page}: an interval typed by hand"


def test_the_readmes_table_has_the_figures_of_the_committed_rows() -> None:
    """``| FedAvg, FL | 77.5 (72.5) | … |``: measured means, the paper's figures in brackets."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = [line.strip("| ").split(" | ") for line in text.splitlines() if re.match(r"\| .*\d\.\d", line)]
    rows = [*read_seed_rows(RESULTS / "table1.csv"), *read_seed_rows(RESULTS / table1.CONTROL_ROWS)]
    table = arm_table(TableOne(rows))
    columns = [table.head.index(name) for name in ("AdvBench %", "MT-Bench", "XSTest: innocent refused %")]
    wanted: list[list[str]] = []
    for line in table.rows:
        figures = [line[column].partition(" ")[0] for column in columns]
        if line[0] != "– in the paper":
            wanted.append([line[0], *figures])
            continue
        for place, published in enumerate(figures, start=1):
            wanted[-1][place] += f" ({published})" if published else ""
    assert shown == wanted


def test_the_readmes_rule_is_the_one_that_is_run() -> None:
    """``tests/distributed/test_extend.py`` runs the examples of docs/extend.md, of which the first is a rule."""
    readme, page = (ROOT / name for name in ("README.md", "docs/extend.md"))
    (shown,) = re.findall(r"```python\n(.*?)```", readme.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert shown == re.findall(r"```python\n# krum.py\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)[0]


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 200


def test_the_replay_control_was_measured_with_the_patch() -> None:
    """The control is no configuration: rows of a commit without changes would be CAI's own."""
    rows = read_seed_rows(RESULTS / table1.CONTROL_ROWS)
    patch = (RESULTS / "replay-control.patch").read_text(encoding="utf-8")
    assert "+                [[pair.rejected for pair in batch] for batch in batches]," in patch
    assert {row.commit for row in rows} == {"883972f9a1 with changes"}, "the patch's own base, and the patch"
    kept = {row.figure: row.outcomes is not None for row in rows if not row.figure.startswith("cai/")}
    assert all(kept.values()) and len(kept) == 8
    losses = [row.value for row in rows if row.figure == "cai/dpo_loss"]
    assert losses == pytest.approx([math.log(2)] * 5, abs=1e-6), "no DPO"


def test_the_committed_rows_of_table_1_are_few_enough_to_read() -> None:
    rows = read_seed_rows(RESULTS / "table1.csv")
    assert len({(row.aggregation, row.method, row.seed, row.figure) for row in rows}) == len(rows)
    assert all(re.fullmatch(r"[0-9a-f]{10}", row.commit) for row in rows), "measured by a commit, without changes"
    total = sum(path.stat().st_size for path in RESULTS.iterdir() if path.suffix != ".png")
    assert total < 300_000
