"""Generated blocks of README.md and docs/ equal what their tools write from the committed rows."""

from __future__ import annotations

import importlib.util
import json
import math
import re
from pathlib import Path
from types import ModuleType

import pytest

import tools.chaos.run
import tools.costs
import tools.exact_cost
import tools.soak
import tools.sweep
import tools.table1
import tools.table2
from fedsim.study.grid import read_sweep
from fedsim.study.published import Blocks, updated_pages
from fedsim.study.seed_rows import read_seed_rows

ROOT = Path(__file__).parents[1]


def tool(name: str) -> ModuleType:
    """A script of tools/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_of_sources_is_up_to_date() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert tool("readme_sources").updated(text) == text, "run: python tools/readme_sources.py"


def test_the_benchmark_tables_are_those_of_the_committed_rows() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert tool("readme_bench").updated(text) == text, "run: python tools/readme_bench.py"


@pytest.mark.parametrize("name", ["readme_bench", "readme_demo", "readme_sources"])
def test_a_tool_that_is_asked_for_help_writes_nothing(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = tool(name)
    setattr(found, "write", lambda _: pytest.fail("it wrote"))  # noqa: B010
    with pytest.raises(SystemExit) as left:
        found.main(["--help"])
    assert left.value.code == 0 and f"usage: tools/{name}.py" in capsys.readouterr().out
    assert found.main(["--nonsense"]) == 2


def test_the_demos_tool_names_a_folder_that_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tool("readme_demo").main([str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        f"error: {tmp_path}: holds no config.yaml; give the directory of a finished run, such as runs/demo\n"
    )


SWEEPS = sorted((ROOT / "configs" / "sweeps").glob("*.yaml"))


def block(page: str, name: str) -> str:
    """What stands in a page's block."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = re.findall(rf"<!-- {name}: begin -->\n(.*?)\n<!-- {name}: end -->", text, flags=re.DOTALL)
    assert len(found) == 1, f"{page} has one block {name}"
    return str(found[0])


def stale(blocks: Blocks) -> list[str]:
    """Pages that are not as the committed rows make them."""
    pages = updated_pages(ROOT, blocks)
    return [str(page) for page, text in pages.items() if (ROOT / page).read_text(encoding="utf-8") != text]


def test_table_1_is_that_of_the_committed_rows() -> None:
    assert stale(tools.table1.blocks(ROOT)) == [], "run: python tools/table1.py --pages"


def test_table_2_is_that_of_the_committed_counts() -> None:
    assert stale(tools.table2.blocks(ROOT)) == [], "run: python tools/table2.py --pages"


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_a_sweeps_page_is_that_of_its_committed_records(path: Path) -> None:
    assert stale(tools.sweep.blocks(ROOT, read_sweep(path, "quick"))) == [], (
        f"run: python tools/sweep.py {path} --pages"
    )


def test_the_demos_table_is_that_of_its_committed_rows() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert tool("readme_demo").updated(ROOT) == text, "run: python tools/readme_demo.py"


def test_the_table_of_kills_is_that_of_its_committed_result() -> None:
    found = json.loads(tools.chaos.run.RESULT.read_text(encoding="utf-8"))
    assert block("README.md", "chaos") == tools.chaos.run.block(found)


@pytest.mark.parametrize("made_by", [tools.exact_cost, tools.soak], ids=["exact_cost", "soak"])
def test_tables_of_long_runs_are_those_of_the_committed_rows(made_by: ModuleType) -> None:
    message = f"run: python tools/{made_by.NAME}.py --readme"
    assert block("README.md", made_by.NAME) == made_by.block(), message


def test_the_costs_are_those_of_the_committed_rows() -> None:
    work = tools.costs.paper_work()
    found = tools.costs.projected_report(work)
    message = "run: python tools/costs.py --readme"
    assert block("README.md", "costs") == tools.costs.block(found), message
    page = (ROOT / "docs" / "costs.md").read_text(encoding="utf-8")
    assert page == tools.costs.page(found, work, None), message


def test_every_block_is_held_by_a_test() -> None:
    """A new block needs a test above."""
    held = {"replay", "demo", "table1", "table2", "bench", "exact_cost", "soak", "sources", "costs", "chaos"}
    held |= {path.stem for path in SWEEPS}
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    begun = {name for page in pages for name in re.findall(r"<!-- (\S+): begin -->", page.read_text(encoding="utf-8"))}
    assert begun == held


def test_no_figure_of_the_embedded_world_stands_outside_the_blocks() -> None:
    """Percentages and points of results come from rows: none is typed beside the blocks of these pages."""
    for page in ("README.md", "docs/table1.md", "docs/embedded-world.md", "docs/sweeps.md"):
        text = (ROOT / page).read_text(encoding="utf-8")
        bare = re.sub(r"<!-- (\S+): begin -->.*?<!-- \1: end -->", "", text, flags=re.DOTALL)
        assert "reproduced" not in bare.replace("*reproduced in the embedded world*", ""), page
        assert not re.search(r"\d\.\d+ \[", bare), f"{page}: an interval outside the blocks"


def test_the_replay_control_was_measured_with_the_patch() -> None:
    """The control is no configuration: rows of a commit without changes would be CAI's own."""
    rows = read_seed_rows(ROOT / "docs" / "results" / tools.table1.CONTROL_ROWS)
    patch = (ROOT / "docs" / "results" / "replay-control.patch").read_text(encoding="utf-8")
    assert "+                [[pair.rejected for pair in batch] for batch in batches]," in patch
    assert {row.commit for row in rows} == {"883972f9a1 with changes"}, "the patch's own base, and the patch"
    kept = {row.figure: row.outcomes is not None for row in rows if not row.figure.startswith("cai/")}
    assert all(kept.values()) and len(kept) == 8
    losses = [row.value for row in rows if row.figure == "cai/dpo_loss"]
    assert losses == pytest.approx([math.log(2)] * 5, abs=1e-6), "no DPO"


def test_the_committed_rows_of_table_1_are_few_enough_to_read() -> None:
    rows = read_seed_rows(ROOT / "docs" / "results" / "table1.csv")
    assert len({(row.aggregation, row.method, row.seed, row.figure) for row in rows}) == len(rows)
    assert all(re.fullmatch(r"[0-9a-f]{10}", row.commit) for row in rows), "measured by a commit, without changes"
    total = sum(path.stat().st_size for path in (ROOT / "docs" / "results").iterdir())
    assert total < 300_000
