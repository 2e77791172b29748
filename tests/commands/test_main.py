"""``fedsim`` and its small commands: help, unknown words, the list and the resolved configuration."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from fedsim import __main__ as command
from fedsim.base import version
from fedsim.config import load_config, to_nested
from fedsim.config.loading import SHIPPED, config_file
from fedsim.extend import KINDS
from fedsim.study.command import results_folder

ROOT = Path(__file__).parents[2]

RULE = '''
from fedsim import FedAvg


class Half(FedAvg):
    """Half of FedAvg's step.

    The rest of the docstring.
    """

    def __init__(self, share: float = 0.5, *, least: int):
        self.share = share
'''


def test_help_names_every_command_with_one_line_and_imports_none() -> None:
    code = (
        "import sys; from fedsim.__main__ import main; assert main(['--help']) == 0; "
        "assert not {'torch', 'yaml', 'fedsim.commands'} & sys.modules.keys()"
    )
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert re.findall(r"^  ([a-z0-9]+) +\S.{10,68}$", shown, flags=re.MULTILINE) == list(command.COMMANDS)
    assert all(len(line) <= 80 for line in shown.splitlines())


def test_every_command_has_its_own_help(capsys: pytest.CaptureFixture[str]) -> None:
    for name in command.COMMANDS:
        with pytest.raises(SystemExit) as left:
            command.main([name, "--help"])
        assert left.value.code == 0
        shown = capsys.readouterr().out
        assert f"fedsim {'run' if name == 'check' else name}" in shown.partition("\n\n")[0]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["tabel1"], "'tabel1' is no command; did you mean table1?"),
        (["launch/run.py"], "'launch/run.py' is no command; give one of run, check, table1"),
        ([], "names no command; give one of run, check"),
        (["run", "federation.num_round=3"], "the nearest key is federation.num_rounds"),
        (["list", "guard.knid"], "did you mean guard.kind?"),
        (["list", "guard.kind", "oracel"], "did you mean oracle?"),
        (["config", "--markdown", "seed=1"], "takes no 'seed=1'"),
        (["sweep"], "one sweep file, such as configs/sweeps/cai.yaml"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(words: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and told in error


def test_a_launchers_rank_may_stand_before_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """``deepspeed --module fedsim run`` starts ``-m fedsim --local_rank=1 run``; ``check`` is ``run --check``."""
    seen: list[list[str]] = []
    monkeypatch.setattr(command, "load_target", lambda target: lambda words: seen.append([target, *words]) or 0)
    assert command.main(["--local_rank=1", "run", "a.yaml"]) == 0
    assert command.main(["check", "seed=1"]) == 0
    target = "fedsim.commands.run:main"
    assert seen == [[target, "--local_rank=1", "a.yaml"], [target, "--check", "seed=1"]]


def test_the_list_has_every_name_in_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["list"]) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    assert re.findall(r"^(\S+)$", shown, flags=re.MULTILINE) == list(KINDS)
    entries = re.findall(r"^  ([a-z][\w.-]*\w)$", shown, flags=re.MULTILINE)
    wanted = []
    for kind in KINDS.values():
        wanted += [kind.own_key.format(name) if kind.own_key else name for name in kind.own]
    assert entries == wanted and len(wanted) > 20
    assert "(no docstring)" not in shown
    assert "      keys: federation.prox_mu\n" in shown and "(needed)" not in shown


def test_one_key_and_a_rule_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "half.py"
    file.write_text(RULE, encoding="utf-8")
    assert command.main(["list", "federation.algorithm", f"{file}:Half"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:] == ["      Half of FedAvg's step.", "      options: share=0.5, least (needed)"]
    assert command.main(["list", "guard.kind"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("guard.kind\n") and "  noisy_oracle\n" in shown and "federation.algorithm" not in shown


def test_the_resolved_configuration_is_a_file_that_gives_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["configs/table1.yaml", "federation.num_rounds=3"]
    assert command.main(["config", *words]) == 0
    file = tmp_path / "resolved.yaml"
    file.write_text(capsys.readouterr().out, encoding="utf-8")
    want = load_config(SHIPPED / "table1.yaml", words[1:])
    assert load_config(file) == want and yaml.safe_load(file.read_text(encoding="utf-8")) == to_nested(want)


def test_shipped_configurations_are_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of that name in the working directory comes first; other names are never looked up."""
    monkeypatch.chdir(tmp_path)
    named = Path("configs/demo.yaml")
    assert config_file(named) == SHIPPED / "demo.yaml"
    assert config_file(Path("demo.yaml")) == Path("demo.yaml")
    assert config_file(Path("configs/absent.yaml")) == Path("configs/absent.yaml")
    named.parent.mkdir()
    named.write_text("seed: 7\n", encoding="utf-8")
    assert load_config(named).seed == 7


def test_without_a_clone_nothing_is_published(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert results_folder("--page") == ROOT / "docs" / "results"
    monkeypatch.setattr(version.fedsim, "__file__", "/usr/lib/python3/site-packages/fedsim/__init__.py")
    assert version.repository() is None
    for words in (["table1", "--publish"], ["table2", "--page"], ["sweep", "configs/sweeps/cai.yaml", "--page"]):
        assert command.main(words) == 2
        assert f"error: {words[-1]}: needs docs/results of a clone" in capsys.readouterr().err
