"""The command line: files, overrides and what launchers add, in any order."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedsim.base.errors import ConfigError
from fedsim.config import load_config
from fedsim.config.command_line import DEFAULT, parse_command


@pytest.mark.parametrize("spelling", ["--local_rank=1", "--local-rank=1"])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_launchers_local_rank_may_stand_anywhere(spelling: str, place: int) -> None:
    words = ["run.yaml", "local.lr=-1"]
    command = parse_command([*words[:place], spelling, *words[place:]])
    assert (command.file, command.overrides, command.local_rank) == (Path("run.yaml"), ["local.lr=-1"], 1)


def test_nothing_runs_the_demo() -> None:
    command = parse_command([])
    assert (command.file, command.overrides, command.local_rank) == (DEFAULT, [], None)
    assert load_config(command.file).name == "demo"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--nope"], r"--nope.*--help"),
        (["--local_rank=two"], r"local_rank.*'two'"),
        (["a.yaml", "b.yml"], r"one config file at most, not 2: a\.yaml b\.yml"),
        (["a.json"], r"'a\.json': must be a config file"),
    ],
)
def test_mistakes_are_config_errors(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_command(words)


@pytest.mark.parametrize(("rank", "is_shown"), [(None, True), ("0", True), ("1", False), ("3", False)])
def test_of_several_processes_one_prints_the_help(
    rank: str | None, is_shown: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    with pytest.raises(SystemExit) as ended:
        parse_command(["--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr()
    assert ("federation.num_rounds" in shown.out, shown.err) == (is_shown, "")
