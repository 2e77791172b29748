"""A benchmark in a user's file: its figures appear everywhere, and what is wrong with it is said in one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedsim.base.artefacts import ArtefactStore
from fedsim.base.errors import ConfigError, DataError, FedsimError
from fedsim.base.figures import FILE, Benchmarks, Figure, read_benchmarks, write_benchmarks
from fedsim.base.ranks import OneRank
from fedsim.config import Config, EvalConfig, load_config, to_flat
from fedsim.data.chat import ChatFormat, Conversation
from fedsim.evaluate.intervals import Mean, Rate
from fedsim.evaluate.own import DESCRIBED
from fedsim.evaluate.suite import Evaluation, Suite, evaluate
from fedsim.record.metrics import Row
from fedsim.record.outcomes import read_items
from fedsim.report.plots import plot_helpfulness, plot_safety, write_plots
from fedsim.report.summary import facts_from, summary_markdown
from fedsim.run.benchmarks import load_suite, users_benchmarks, write_outcomes, write_texts

BREVITY = '''
"""Brevity."""

from fedsim import Benchmark, Dialogues, Figure, Sampling


class Brevity(Benchmark):
    """Are replies short, and how long are they?"""

    name, title = "brevity", "Brevity"
    figures = (
        Figure("brevity_short", "Brevity: short replies", headline=True),
        Figure("brevity_words", "Brevity: words of a reply", "words", scale=None, headline=True),
    )

    def __init__(self, most: int = 3):
        self.most = most

    def load(self, path):
        return path.read_text(encoding="utf-8").splitlines()

    def ask(self, items, key):
        return [Dialogues([[{"role": "user", "content": item}] for item in items], Sampling(0.0, 64), [key])]

    def score(self, engine, items, replies):
        words = [len(reply.text.split()) for reply in replies[0][0]]
        return {
            "brevity_short": [None if item.endswith("!") else float(n <= self.most) for n, item in zip(words, items)],
            "brevity_words": words,
        }
'''

LEFT_OUT = {"advbench": "", "hhh": "", "mt_bench": "", "xstest": "", "helpful": ""}
QUESTIONS = ["one", "two words", "three more words", "and here are four", "never count this!"]


@pytest.fixture()
def settings(tmp_path: Path) -> Callable[..., EvalConfig]:
    """``settings(source, **options)``: an evaluation by the benchmark Brevity of a file."""

    def made(source: str = BREVITY, **options: Any) -> EvalConfig:
        code, file = tmp_path / "brevity.py", tmp_path / "questions.txt"
        code.write_text(source, encoding="utf-8")
        file.write_text("\n".join(QUESTIONS), encoding="utf-8")
        own = {"kind": f"{code}:Brevity", "path": str(file), "options": options}
        left_out = [f"eval.{name}=" for name in LEFT_OUT]
        return load_config(None, [*left_out, f"eval.benchmarks=[{own}]"]).eval

    return made


Settings = Callable[..., EvalConfig]


def measured(
    settings: EvalConfig, tmp_path: Path, chat: ChatFormat, stub_engine: type
) -> tuple[Suite, dict[str, Path], Evaluation, Any]:
    """An evaluation by an engine that repeats what it is asked."""

    def echo(conversation: Conversation) -> str:
        return conversation[-1]["content"]

    engine = stub_engine(chat, reply=echo)
    suite, files = load_suite(settings, ArtefactStore(tmp_path / "artefacts", OneRank(), lambda text: None))
    return suite, files, evaluate(engine, suite, ("eval",)), engine


def test_its_figures_are_in_metrics_items_summary_and_plots(
    settings: Settings, tmp_path: Path, chat: ChatFormat, stub_engine: type
) -> None:
    suite, files, found, engine = measured(settings(), tmp_path, chat, stub_engine)
    assert files == {"brevity": tmp_path / "questions.txt"} and suite.counts() == {"Brevity": 5}
    assert [key for _, _, key in engine.calls] == [("eval", "brevity")], "draws are named by the benchmark"

    short, words = Rate(3, 4), Mean.of([1, 2, 3, 4, 3])
    low, high = short.percent_interval
    expected = {
        "eval/brevity_short": 75.0, "eval/brevity_short_low": low, "eval/brevity_short_high": high,
        "eval/brevity_short_count": 4, "eval/brevity_words": words.value, "eval/brevity_words_low": words.low,
        "eval/brevity_words_high": words.high, "eval/brevity_words_count": 5, "eval/brevity_truncated": 0,
        "eval/brevity_num_texts": 5, "eval/num_replies": 5,
    }  # fmt: skip
    assert {name: found.metrics[name] for name in expected} == expected
    assert "eval/brevity_distinct_2" in found.metrics and "eval/brevity_repeated_suffix" in found.metrics

    write_outcomes(found, tmp_path / "items" / "round1-global.csv")
    items = read_items(tmp_path / "items" / "round1-global.csv")
    assert {name: values.tolist() for name, values in items.items()} == {
        "brevity_short": [1, 1, 1, 0], "brevity_words": [1, 2, 3, 4, 3]
    }  # fmt: skip
    write_texts(found, suite, tmp_path / "answers", "x", attacks=False)
    assert not (tmp_path / "answers").exists(), "replies are written with record.texts alone"
    write_texts(found, suite, tmp_path / "answers", "x", attacks=True)
    assert QUESTIONS[3] in (tmp_path / "answers" / "brevity-x.json").read_text(encoding="utf-8")

    write_benchmarks(tmp_path, suite.described)
    kept = read_benchmarks(tmp_path)
    assert kept == suite.described, "read without the user's file"
    rows: list[Row] = [{"round": number, "stage": "eval", "point": "global", **found.metrics} for number in (1, 2)]
    text = summary_markdown(rows, facts_from(to_flat(Config()), num_ranks=1, total_s=1.0, places={}, benchmarks=kept))
    assert "| Brevity: short replies, % (n = 4) | Brevity: words of a reply, words (n = 5) |" in text
    assert f"| brevity_short | 75.00 % [{low:.2f}, {high:.2f}] of 4 |" in text
    assert f"| brevity_words | 2.60 words [{words.low:.2f}, {words.high:.2f}], n = 5 |" in text
    assert "- Brevity replies truncated: after training 0 of 5, in all 0 of 10." in text
    for draw, label in ((plot_safety, "short replies, %"), (plot_helpfulness, "words of a reply, words")):
        picture = draw(rows, "run", kept)
        assert picture is not None and [axes.get_ylabel() for axes in picture.axes] == [f"Brevity: {label}"]
    assert [path.name for path in write_plots(rows, tmp_path, "run", kept)] == ["safety.png", "helpfulness.png"]


def test_options_reach_the_constructor_and_limit_takes_a_subset(
    settings: Settings, tmp_path: Path, chat: ChatFormat, stub_engine: type
) -> None:
    suite, _, found, _ = measured(settings(most=4), tmp_path, chat, stub_engine)
    assert found.metrics["eval/brevity_short"] == 100.0
    few = evaluate(stub_engine(chat, reply=lambda talk: "yes"), Suite(suite.parts, limit=2), ("eval",))
    assert few.metrics["eval/brevity_words_count"] == 2 and len(few.items["brevity_words"]) == 2
    with pytest.raises(ConfigError, match=r"eval\.benchmarks\.options\.mots=4: .*did you mean most"):
        users_benchmarks(settings(mots=4))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('Figure("brevity_short", ', 'Figure("short", ', "figure 'short' must be named brevity, or brevity_"),
        ('name, title = "brevity"', 'name, title = "hhh"', "figure 'brevity_short' must be named hhh"),
        ('name, title = "brevity", "Brevity"', 'title = "Brevity"', "needs a name"),
        ("def score", "def skore", "abstract method"),
        ('"brevity_words": words', '"brevity_chars": words', "'brevity_chars', which is none of its figures"),
        ('"brevity_words": words', '"brevity_words": words[1:]', "'brevity_words' 4 values for 5 items"),
        ("float(n <= self.most)", "n", "'brevity_short' the value 2; values must be from 0 to 1"),
        ("len(reply.text.split())", "len(reply.test)", r"brevity\.py, line \d+, in .*: AttributeError"),
        ("return path.read", "raise ValueError(path.read", r"brevity\.py, line \d+, in load: ValueError"),
    ],
)
def test_what_is_wrong_with_it_is_said(
    settings: Settings, tmp_path: Path, chat: ChatFormat, stub_engine: type, old: str, new: str, message: str
) -> None:
    assert old in BREVITY
    source = BREVITY.replace(old, new)
    if "raise" in new:
        source = source.replace(".splitlines()", ")")
    with pytest.raises(FedsimError, match=message) as caught:
        measured(settings(source), tmp_path, chat, stub_engine)
    assert "\n" not in str(caught.value) and not any(question in str(caught.value) for question in QUESTIONS[1:])


@pytest.mark.parametrize("name", ["square", "constitution", "limit", "every"])
def test_a_name_that_means_something_else_is_refused(settings: Settings, tmp_path: Path, name: str) -> None:
    source = BREVITY.replace('name, title = "brevity"', f'name, title = "{name}"').replace('"brevity_', f'"{name}_')
    with pytest.raises(ConfigError, match=f"the name '{name}' means another file or key"):
        users_benchmarks(settings(source))


def test_names_occur_once(settings: Settings) -> None:
    source = BREVITY.replace('"brevity"', '"hhh"').replace("brevity_", "hhh_own_")
    with pytest.raises(ConfigError, match=r"eval\.benchmarks: the benchmark hhh is there twice"):
        users_benchmarks(settings(source))


def test_a_figure_stands_for_its_variants() -> None:
    for name, expected in (
        ("mt_bench_category_math", "mt_bench_category"),
        ("hhh_letter_undecided", "hhh_letter_undecided"),
        ("xstest_safe_refused_gcg", "xstest_safe_refused"),
        ("advbench_harmless_polite", "advbench_harmless"),
    ):
        figure = DESCRIBED.of(name)
        assert figure is not None and figure.name == expected
    assert DESCRIBED.of("num_replies") is None
    assert Figure("a", "A: b", "points", scale=(1.0, 10.0)).label == "A: b, 1–10"


def test_descriptions_are_read_back_and_damage_is_said(tmp_path: Path) -> None:
    assert read_benchmarks(tmp_path) is None
    write_benchmarks(tmp_path, DESCRIBED)
    assert read_benchmarks(tmp_path) == DESCRIBED
    (tmp_path / FILE).write_text('[{"name": "a"}]', encoding="utf-8")
    with pytest.raises(DataError, match=r"benchmarks\.json: is damaged"):
        read_benchmarks(tmp_path)
    assert Benchmarks().headlines == []
