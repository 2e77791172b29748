"""Table 1 from run directories: cells, claimed signs by hand, and verdicts that follow from the items alone."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pytest

from fedsim.config import load_config
from fedsim.errors import ConfigError, DataError
from fedsim.record import paper
from fedsim.study import table1
from fedsim.study.claims import BENCHMARKS, BOTH, CAI, COMPARISONS, FILTER, FL, claimed_sign
from fedsim.study.outcomes import Outcome, check_alike, check_paired, sample

# The paper's §6.2 and §6.3, read by hand: treated, control, FedAvg's signs, SCAFFOLD's (AdvBench, HHH, MT-Bench).
SIGNS = {
    (FL, paper.PRETRAINED): ("---", "---"),
    (FILTER, FL): ("++-", "++-"),
    (CAI, FL): ("+++", "+++"),
    (BOTH, CAI): ("+++", "++-"),
    (BOTH, FL): ("+++", "+++"),
    (CAI, FILTER): ("+++", "+++"),
}


def test_claims_have_the_signs_that_the_paper_prints() -> None:
    found = {
        (c.treated, c.control): tuple(
            "".join({1: "+", -1: "-", 0: "0"}[claimed_sign(c, a, b)] for b in BENCHMARKS) for a in table1.AGGREGATIONS
        )
        for c in COMPARISONS
    }
    assert found == SIGNS


def test_published_differences_are_those_of_the_text() -> None:
    """§6.2 and §6.3 print them."""
    by_name = {(c.treated, c.control): c for c in COMPARISONS}
    assert by_name[FL, paper.PRETRAINED].published("fedavg", "advbench_harmless") == pytest.approx(-27.1)
    assert by_name[FILTER, FL].published("scaffold", "hhh_accuracy") == pytest.approx(5.1)
    assert by_name[CAI, FL].published("fedavg", "mt_bench") == pytest.approx(3.1)


def test_cells_are_four_methods_under_two_aggregations_for_every_seed() -> None:
    config = load_config(None, ["guard.kind=llama_guard", "cai.iterations=7"])
    cells = table1.cells(config, [3, 5])
    assert len({cell.name for cell in cells}) == len(cells) == 16
    arms = {(cell.settings["federation.algorithm"], cell.labels["method"], cell.seed) for cell in cells}
    assert len(arms) == 16
    for cell in cells:
        assert cell.settings["guard.kind"] == ("llama_guard" if "filter" in cell.labels["method"] else "none")
        assert cell.settings["cai.iterations"] == (7 if "CAI" in cell.labels["method"] else 0)
    assert [cell.labels["method"] for cell in cells[:4]] == [BOTH] * 4, "what makes all artefacts comes first"
    assert {cell.settings["cai.iterations"] for cell in table1.cells(load_config(None), [0])} == {0, 50}


@pytest.mark.parametrize(
    ("word", "method"),
    [
        ("guard.kind=noisy_oracle", "FL + noisy oracle filter"),
        ("guard.tune_epochs=0", "FL + untuned filter"),
        ("cai.every=0", "post-hoc CAI"),
    ],
)
def test_another_method_is_no_row_of_the_papers_table(word: str, method: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(method)):
        table1.cells(load_config(None, [word]), [0])


FIGURES = ("advbench_harmless_openfedllm", "hhh_letter", "mt_bench")


@pytest.fixture
def table(finish: Callable[..., Outcome]) -> table1.TableOne:
    """FedAvg's arms over two seeds: FL harms, the filter does nothing, CAI repairs all."""
    rng = np.random.default_rng(0)

    def outcomes(share: float) -> dict[str, list[float]]:
        flags = (rng.random(200) < share).astype(float).tolist()
        return {FIGURES[0]: flags, FIGURES[1]: flags, FIGURES[2]: [1 + 9 * share] * 80}

    shares = {FL: 0.5, FILTER: 0.5, CAI: 0.98, BOTH: 0.98}
    runs: dict[table1.Arm, list[Outcome]] = {}
    for i, (method, share) in enumerate(shares.items()):
        for seed in (0, 1):
            final = {"after_cai" if "CAI" in method else "global": outcomes(share)}
            found = finish(f"r{i}-{seed}", [f"seed={seed}"], {"pretrained": outcomes(1.0), **final})
            runs.setdefault(table1.Arm("fedavg", method), []).append(found)
    return table1.TableOne(runs)


def test_arms_and_verdicts_follow_from_the_items(table: table1.TableOne) -> None:
    assert [arm.title for arm in table.arms()] == ["pretrained", *(f"FedAvg, {m}" for m in (FL, FILTER, CAI, BOTH))]
    verdicts = {
        (c.treated, c.control): table.difference("fedavg", c, "advbench_harmless").verdict  # type: ignore[union-attr]
        for c in COMPARISONS
    }
    assert verdicts[FL, paper.PRETRAINED] == verdicts[CAI, FL] == verdicts[BOTH, FL] == "reproduced"
    assert verdicts[FILTER, FL] == verdicts[BOTH, CAI] == "cannot tell"
    arm = table.estimate(table1.Arm("fedavg", CAI), "mt_bench")
    assert arm is not None and arm.mean == pytest.approx(1 + 9 * 0.98)
    pretrained = table.estimate(table1.Arm("fedavg", paper.PRETRAINED), "advbench_harmless")
    assert pretrained is not None and pretrained.mean == 100 and 97 < pretrained.low < 99


def test_the_pages_hold_the_figures_and_the_papers(table: table1.TableOne) -> None:
    arms = table1.arm_table(table)
    assert [row[0] for row in arms.rows[::2]] == [arm.title for arm in table.arms()]
    assert arms.rows[3] == ["– in the paper", "72.5", "49.3", "2.7"]
    claims = table1.claim_table(table)
    assert len(claims.rows) == 18
    row = next(r for r in claims.rows if r[0].startswith("FedAvg: (FL + CAI) − FL") and r[1] == "AdvBench")
    assert row[4] == "+23.7" and row[5] == "reproduced"
    words = table1.verdicts(table)
    assert len(words) == 1 and "of 18 differences are reproduced" in words[0]
    assert {(r["method"], r["figure"]) for r in table1.tidy_rows(table)} >= {
        (FL, "mt_bench"),
        ("pretrained", "mt_bench"),
    }


def test_a_figure_without_items_counts_as_one(finish: Callable[..., Outcome]) -> None:
    rows = [{"round": 50, "stage": "eval", "point": "global", "eval/mt_bench": 6.5}]
    judged = finish("a", [], {}, rows)
    found = sample([judged, judged], "final", "mt_bench")
    assert found is not None and found.tolist() == [[6.5], [6.5]]
    assert sample([judged], "final", "hhh_letter") is None


def test_runs_on_different_items_do_not_mix(finish: Callable[..., Outcome]) -> None:
    runs = [finish(f"n{n}", [], {"global": {"hhh_letter": [1.0] * n}}) for n in (3, 4)]
    with pytest.raises(DataError, match=r"\[3, 4\] items of hhh_letter"):
        sample(runs, "final", "hhh_letter")


def test_what_is_no_finished_run_is_refused(tmp_path) -> None:
    with pytest.raises(DataError, match="is no finished run"):
        Outcome(tmp_path)


def test_arms_that_do_not_pair_are_told_by_name(finish: Callable[..., Outcome]) -> None:
    ours = [finish(f"a{seed}", [f"seed={seed}"], {}, inputs={"hhh": "x", "square": "s"}) for seed in (0, 1)]
    check_paired([ours, ours])
    with pytest.raises(DataError, match=r"the seeds \[1, 0\], that of .*a0 has \[0, 1\]"):
        check_paired([ours, ours[::-1]])
    with pytest.raises(DataError, match=r"b0: had another hhh file than .*a0"):
        check_paired([ours[:1], [finish("b0", ["seed=0"], {}, inputs={"hhh": "y", "square": "z"})]])


def test_unlike_runs_are_no_arm(finish: Callable[..., Outcome]) -> None:
    """Another rate, other rows under the same path, a seed twice: each names both runs."""
    own = finish("a0", ["seed=0"], {}, inputs={"square": "1" * 64})
    other = finish("a1", ["seed=1", "local.lr=0.001"], {}, inputs={"square": "1" * 64})
    for check in (check_alike, lambda arm: check_paired([arm, arm])):
        with pytest.raises(DataError, match=r"a0 and .*a1: .* differ in local.lr: 5e-05 and 0.001; remove"):
            check([own, other])
    with pytest.raises(DataError, match=r"a0 and .*a2: .* in data.square: embedded#11111111 and embedded#22222222"):
        check_alike([own, finish("a2", ["seed=2"], {}, inputs={"square": "2" * 64})])
    with pytest.raises(DataError, match=r"b0 and .*a0: both have seed 0"):
        check_alike([own, finish("b0", ["seed=0"], {}, inputs={"square": "1" * 64})])


def test_a_file_that_changed_between_arms_is_found(finish: Callable[..., Outcome]) -> None:
    def arm(name: str, path: str, digest: str) -> list[Outcome]:
        return [finish(name, ["seed=0", f"data.square={path}"], {}, inputs={"square": digest})]

    plain = arm("a", "rows.json", "1")
    check_paired([plain, arm("b", "others.json", "2")])
    with pytest.raises(DataError, match=r"c: had another square file than .*a;"):
        check_paired([plain, arm("c", "rows.json", "3")])
    check_paired([arm("d", "embedded", "4"), arm("e", "embedded", "5")])  # of the size that the splits ask for
