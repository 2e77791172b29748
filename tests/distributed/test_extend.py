"""Code of a user's own in whole runs: every example of docs/extend.md, robust rules, errors; on several processes."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import fedsim
from fedsim.base.artefacts import file_digest
from fedsim.base.errors import FedsimError
from fedsim.config import load_config
from fedsim.federation.participation import sample_cohort
from tests.distributed.entry import run_entry
from tests.distributed.test_exact import assert_same, outcome, places, simulate

ROOT = Path(__file__).parents[2]
SMALL = Path(__file__).parent / "small.yaml"
PAGE = (ROOT / "docs" / "extend.md").read_text(encoding="utf-8")
BRIEF = ["federation.num_rounds=2", "cai.iterations=0", "eval.every=0", "eval.limit=2", "eval.mt_bench=", "eval.hhh=",
         "eval.xstest=", "eval.helpful=", "eval.guard_judge=none", "guard.kind=none", "record.texts=false"]  # fmt: skip

ROBUST = """
import torch
from fedsim import Algorithm, ServerState


class Median(Algorithm):
    '''The middle value of every number.'''
    wants = "updates"

    def server_step(self, state, updates):
        assert list(updates.clients) == sorted(updates.clients) and len(updates.weights) == len(updates.deltas)
        return ServerState((state.adapter + updates.deltas.double().quantile(0.5, dim=0)).float())


class Momentum(Median):
    '''SCAFFOLD's correction beside a median with momentum: control variates and a vector of its own.'''
    vector_names = ("control", "momentum")
    has_control = True

    def __init__(self, decay=0.5):
        self.decay = decay
        from fedsim.federation.scaffold import Scaffold
        self.scaffold = Scaffold("gradient")

    def correction(self, state, client_control):
        return self.scaffold.correction(state, client_control)

    def server_step(self, state, updates):
        assert updates.control_deltas.shape == updates.deltas.shape
        momentum = (self.decay * state.vectors["momentum"].double() + updates.deltas.double().median(dim=0).values)
        control = state.vectors["control"] + updates.control_deltas.double().sum(dim=0) / updates.num_clients
        vectors = {"momentum": momentum.float(), "control": control.float()}
        return ServerState((state.adapter + momentum).float(), vectors)
"""


QUESTIONS = "Where is the kite?\nWho has the boat?\nIs it far?\n"


def examples() -> dict[str, str]:
    """The page's files by name."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    return {block.split()[1]: block for block in blocks if block.startswith("# ")}


def commands() -> list[list[str]]:
    """The ``key=value`` words of the page's commands."""
    found = [shlex.split(line) for line in re.findall(r"```sh\n(.*?)\n```", PAGE, re.DOTALL)]
    assert all(words[:3] == ["fedsim", "run", "configs/demo.yaml"] for words in found)
    return [words[3:] for words in found]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page's files, and the rules of this file."""
    made = tmp_path_factory.mktemp("files")
    for name, text in {**examples(), "robust.py": ROBUST, "questions.txt": QUESTIONS}.items():
        (made / name).write_text(text, encoding="utf-8")
    return made


def located(word: str, folder: Path) -> str:
    """A command's word with the page's files where the test has them."""
    return re.sub(r"\b(\w+\.py:|questions\.txt)", rf"{folder}/\1", word)


def runs(pool: Any, folder: Path, square_file: Path, sizes: tuple[int, ...], *words: str) -> dict[int, dict[str, Any]]:
    """Outcomes by number of processes, side by side, and each run's directory."""
    homes = {size: folder / f"run{abs(hash(words))}-{size}" for size in sizes}
    jobs = [(n, simulate, [*BRIEF, *words, *places(home, square_file)], None) for n, home in homes.items()]
    pool.run_all(jobs)
    return {n: outcome(home / "small", home / "artefacts") | {"folder": home / "small"} for n, home in homes.items()}


def rows(run: dict[str, Any], stage: str) -> list[dict[str, Any]]:
    return [row for row in map(json.loads, run["rows"]) if row["stage"] == stage]


def test_every_command_of_the_page_is_a_configuration_and_every_file_is_used(folder: Path) -> None:
    found = commands()
    used = {name for name in examples() if any(f"{name}:" in word for words in found for word in words)}
    assert used == set(examples()) and len(used) == 8
    for words in found:
        load_config(ROOT / "configs" / "demo.yaml", [located(word, folder) for word in words])


@pytest.fixture(scope="module")
def together(pool: Any, folder: Path, square_file: Path) -> dict[int, dict[str, Any]]:
    """All examples of the page in one run, as its commands give them; attacks are put into one list."""
    given = [located(word, folder) for words in commands() for word in words if not word.startswith("name=")]
    words = [word for word in given if not word.startswith("attacks=")]
    attacks = [word for word in given if word.startswith("attacks=")]
    joined = ", ".join(word.removeprefix("attacks=[").removesuffix("]") for word in attacks)
    joined = joined.replace("from_round: 3", "from_round: 2").replace("share: 0.2", "share: 0.5")
    words.append("eval.mt_bench=embedded")  # for the judge
    return runs(pool, folder, square_file, (1, 2), *words, f"attacks=[{joined.replace('share: 0.1', 'share: 0.2')}]")


def test_the_page_s_examples_are_the_same_on_1_and_2_processes(together: dict[int, dict[str, Any]]) -> None:
    assert_same(together[2], together[1], "2 processes against 1")
    assert judgments(together[2]) == judgments(together[1]) and len(judgments(together[1])) == 8


def test_every_example_of_the_page_did_something(together: dict[int, dict[str, Any]], folder: Path) -> None:
    run = together[1]
    manifest = json.loads((run["folder"] / "manifest.json").read_text(encoding="utf-8"))
    code = {role: entry["sha256"] for role, entry in manifest["inputs"].items() if role.startswith("code of ")}
    files = {
        "federation.algorithm": "krum.py",
        "federation.partition": "by_question.py",
        "guard.kind": "words.py",
        "eval.advbench_phrases": "polite.py",
        "eval.benchmarks.0.kind": "brevity.py",
        "judge.kind": "concise.py",
        "attacks.0.kind": "sign_flip.py",
        "attacks.1.kind": "relabel.py",
    }
    assert code == {f"code of {key}": file_digest(folder / name) for key, name in files.items()}
    flippers, answerers = (manifest["attackers"][f"attacks.{place}"] for place in range(2))
    assert (len(flippers), len(answerers)) == (3, 1) and not set(flippers) & set(answerers)
    for number, row in enumerate(rows(run, "round")):
        cohort = sample_cohort(6, 5, number, 0)
        active = answerers if number == 0 else [*flippers, *answerers]
        assert row["client/num_attackers"] <= len(set(cohort) & set(active))
    (kept,) = rows(run, "filter")
    assert 0 < kept["client/num_kept_rows"] < 60 and kept["guard/accuracy"] > 50
    ends = [row for row in rows(run, "eval") if "eval/advbench_harmless_polite" in row]
    assert len(ends) == 2 and all(row["eval/advbench_harmless"] == row["eval/advbench_harmless_polite"] for row in ends)
    for row in rows(run, "eval"):
        assert (row["eval/brevity_short_count"], row["eval/brevity_words_count"]) == (2, 2)
        assert 0 <= row["eval/brevity_short"] <= 100 and row["eval/brevity_words"] > 0
    for row in rows(run, "eval"):
        found = [judged["score"] for judged in judgments(run) if judged["model"].endswith(str(row["point"]))]
        assert len(found) == 4 and row["eval/mt_bench_unrated"] == found.count(-1)
        rated = [score for score in found if score != -1]
        assert row["eval/mt_bench"] == pytest.approx(sum(rated) / len(rated)) and all(1 <= s <= 10 for s in rated)
    assert manifest["inputs"]["brevity"]["sha256"] == file_digest(folder / "questions.txt")
    assert any(name.startswith("users-guard-verdicts-") for name in run["artefacts"])
    summary = (run["folder"] / "summary.md").read_text(encoding="utf-8")
    assert "Krum, FL + Words filter under 50 % SignFlip and 20 % OneAnswer" in summary
    assert re.search(r"attack SignFlip: client\(s\) [\d, ]+ \(3 of 6\), rounds 2 to the last", summary)


def judgments(run: dict[str, Any]) -> list[dict[str, Any]]:
    """The judgments of the page's judge, without times."""
    (file,) = (run["folder"] / "answers" / "mt_bench" / "model_judgment").glob("Concise-*_single.jsonl")
    return [json.loads(line) | {"tstamp": 0} for line in file.read_text(encoding="utf-8").splitlines()]


def robust(folder: Path, name: str, *words: str) -> list[str]:
    return [f"federation.algorithm={folder / 'robust.py'}:{name}", *words]


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        pytest.param("Median", (1, 2), id="median", marks=pytest.mark.deep),
        pytest.param("Median", (3, 4), id="median-deep", marks=pytest.mark.deep),
        pytest.param("Momentum", (1, 4), id="control-deep", marks=pytest.mark.deep),
    ],
)
def test_a_rule_of_all_updates_is_the_same_on_any_number_of_processes(
    pool: Any, folder: Path, square_file: Path, name: str, sizes: tuple[int, ...]
) -> None:
    """Wide lanes, a client that drops out, and a stop included."""
    failing = ["failures.dropout_rate=0.2", "federation.num_rounds=3"]
    found = runs(pool, folder, square_file, sizes, *robust(folder, name), *failing)
    few, many = (found[size] for size in sizes)
    assert_same(many, few, f"{sizes[1]} processes against {sizes[0]}")
    assert len({row["global/checksum"] for row in rows(few, "round")}) == 3
    assert any(row["client/num_dropped_out"] for row in rows(few, "round"))
    home = folder / f"stopped-{name}-{sizes[0]}"
    words = [*BRIEF, *robust(folder, name), *failing, *places(home, square_file)]
    pool.run(sizes[1], simulate, words, ("before", 1))
    pool.run(sizes[0], simulate, words, None)
    assert_same(outcome(home / "small", home / "artefacts"), few, "stopped and resumed")


BROKEN = """
from fedsim import Algorithm, ServerState
{top}

class Broken(Algorithm):
    wants = "updates"

    def __init__(self):
        {start}

    def server_step(self, state, updates):
        {step}
"""


@pytest.mark.parametrize(
    ("where", "line", "words"),
    [
        ({"top": "1 / 0"}, 3, "ZeroDivisionError: division by zero"),
        ({"top": "def ("}, 3, "SyntaxError"),
        ({"start": "raise ValueError('too many')"}, 9, "in __init__: ValueError: too many"),
        ({"step": "return updates.missing"}, 12, "in server_step: AttributeError"),
    ],
    ids=["import", "syntax", "constructor", "call"],
)
def test_an_error_in_a_user_s_code_is_one_line_with_its_place(
    pool: Any, folder: Path, square_file: Path, where: dict[str, str], line: int, words: str
) -> None:
    file = folder / "broken.py"
    file.write_text(BROKEN.format(**{"top": "", "start": "pass", "step": "pass", **where}), encoding="utf-8")
    home = folder / f"broken-{line}-{words[:5]}"
    given = [str(SMALL), *BRIEF, f"federation.algorithm={file}:Broken", *places(home, square_file)]
    ended = pool.run(2, run_entry, given, timeout_s=60)
    assert [code != 0 for code, _ in ended] == [True, True]
    told = [text for _, shown in ended for text in shown.splitlines() if "error: " in text]
    assert len(told) == 1 and f"{file}, line {line}" in told[0] and words in told[0]
    assert not any("Traceback" in shown for _, shown in ended)


def test_an_error_on_one_process_alone_ends_both(pool: Any, folder: Path, square_file: Path) -> None:
    text = "from fedsim import Attack\nimport os\n\nclass Odd(Attack):\n"
    text += "    def outcome(self, *given): raise KeyError(os.environ['RANK'])\n"
    (folder / "odd.py").write_text(text, encoding="utf-8")
    attack = f"attacks=[{{kind: {folder / 'odd.py'}:Odd, share: 0.2}}]"
    ended = pool.run(2, run_entry, [str(SMALL), *BRIEF, attack, *places(folder / "odd", square_file)], timeout_s=60)
    assert all(code != 0 for code, _ in ended)
    told = [line for _, shown in ended for line in shown.splitlines() if "error: " in line]
    assert len(told) == 1 and f"{folder / 'odd.py'}, line 5, in outcome: KeyError" in told[0]


def twice(folder: str, square: str) -> list[str]:
    """``fedsim.simulate`` two times in this process, and a mistake in between; digests and messages."""
    words = {"data.square": square, "record": {"dir": folder, "artefacts": f"{folder}/artefacts"}}
    words |= {name: yaml.safe_load(value or "''") for name, _, value in (word.partition("=") for word in BRIEF)}
    found = []
    for name in ("one", "two"):
        result = fedsim.simulate(SMALL, name=name, **{**words, "federation.num_rounds": 1, "guard.kind": "none"})
        found.append(file_digest(result.adapter / "adapter_model.safetensors"))
        try:
            fedsim.simulate(SMALL, name="odd", **{**words, "federation.algorithm": "nowhere.py:Rule"})
        except FedsimError as error:
            found.append(type(error).__name__)
    return found


@pytest.mark.deep
def test_a_script_under_a_launcher_may_simulate_twice(pool: Any, folder: Path, square_file: Path) -> None:
    few, (one, other) = (pool.run(size, twice, str(folder / f"twice{size}"), str(square_file)) for size in (1, 2))
    assert one == other == few[0]
    assert one[0] == one[2] and one[1] == one[3] == "ConfigError"


def test_the_median_is_the_median() -> None:
    """The rule of this file against torch's own on odd numbers of clients."""
    deltas = torch.tensor([[1.0, 5.0], [2.0, -4.0], [9.0, 0.0]])
    assert torch.equal(deltas.double().quantile(0.5, dim=0), deltas.median(dim=0).values.double())
