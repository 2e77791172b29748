"""W&B: every round's figures at the right step, exactly once, whatever stops the run or W&B itself."""

from __future__ import annotations

import json
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from fedsim.base.ranks import OneRank
from fedsim.config import Config, load_config, to_nested
from fedsim.parallel.world import World
from fedsim.record import wandb_stream
from fedsim.record.checkpoint import Checkpoint
from fedsim.record.metrics import CLOCK_PREFIXES, RESUME, MetricLog, Row, read_rows
from fedsim.record.run_record import RunRecord
from fedsim.record.sameness import FREE_KEYS
from fedsim.record.wandb_stream import WandbStream
from fedsim.record.wandb_worker import inspected, steps_of, written
from fedsim.report import finish
from fedsim.run.simulation import Simulation

SMALL = Path(__file__).parents[1] / "distributed" / "small.yaml"
SECRET = "a-secret-of-this-machine"

# What a shell, a notebook or a sweep's agent may have set; the first group ends wandb's start, the second is obeyed.
ODD = {
    "WANDB_MODE": "garbage", "WANDB_PROJECT": "a/b", "WANDB_CONSOLE": "loud", "WANDB_SILENT": "perhaps",
    "WANDB_RESUME_FROM": "x?_step=3", "WANDB_FORK_FROM": "x?_step=3", "WANDB_SERVICE": "3-1-tcp-localhost-1-2",
    "WANDB_INIT_TIMEOUT": "soon", "WANDB_RESUME": "never",
    "WANDB_SWEEP_ID": "theirsweep", "WANDB_RUN_ID": "theirs", "WANDB_RUN_GROUP": "theirs", "WANDB_NAME": "theirs",
    "WANDB_TAGS": "theirs", "WANDB_NOTES": "theirs", "WANDB_JOB_TYPE": "theirs", "WANDB_HOST": "theirs",
    "WANDB_DIR": "/theirs", "WANDB_DISABLED": "true",
}  # fmt: skip
OWN = ("_step", "_runtime", "_timestamp")  # fields that wandb adds

Said = list[str]


PATIENT_S = 600.0


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """No limit that a busy machine could reach; tests of the limits set their own."""
    monkeypatch.setattr(wandb_stream, "LIMIT_S", {"offline": PATIENT_S, "online": PATIENT_S})
    monkeypatch.setattr(wandb_stream, "ABORT_S", PATIENT_S)


def made_config(*overrides: str) -> Config:
    return load_config(
        None, ["name=tracked", "wandb.mode=offline", "wandb.group=arms", "wandb.tags=[seed-0]", *overrides]
    )


def test_options_of_attacks_are_not_sent() -> None:
    attack = "{kind: relabel.py:OneAnswer, share: 0.5, options: {text: a reply}}"
    (sent,) = wandb_stream.config_to_send(made_config(f"attacks=[{attack}]"))["attacks"]
    assert sent["kind"] == "relabel.py:OneAnswer" and sent["share"] == 0.5 and "a reply" not in str(sent)


@pytest.mark.parametrize(
    "words",
    [
        ["judge.kind=mine.py:X", "judge.options={text: a reply}"],
        ["guard.kind=mine.py:X", "guard.options={text: a reply}"],
        ["federation.algorithm=mine.py:X", "federation.options={text: a reply}"],
        ["federation.partition=mine.py:X", "federation.partition_options={text: a reply}"],
        ["eval.advbench_phrases=mine.py:X", "eval.advbench_options={text: a reply}"],
        ["eval.benchmarks=[{kind: mine.py:X, path: x, options: {text: a reply}}]"],
    ],
)
def test_options_of_user_code_are_not_sent(words: list[str]) -> None:
    sent = str(wandb_stream.config_to_send(made_config(*words)))
    assert "mine.py:X" in sent and "a reply" not in sent


def begin(folder: Path) -> MetricLog:
    """A run directory with its manifest, and the rows of the preparation."""
    folder.mkdir(exist_ok=True)
    manifest = {"versions": {"fedsim": "1"}, "git": {"commit": "abc"}, "started": {"num_ranks": 2}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    log = MetricLog(folder / "metrics.jsonl")
    log.append(-1, "guard", {"point": "untuned", "guard/f1": 1 / 3})
    log.append(-1, "filter", {"point": "fine-tuned", "guard/f1": 2 / 3, "client/num_kept_rows": 7})
    log.append(-1, "eval", {"point": "pretrained", "eval/hhh_accuracy": 100 / 7})
    return log


def add_round(log: MetricLog, round_idx: int, attempt: int = 0) -> None:
    """A round's three rows; only the time depends on the attempt."""
    figure = 0.1 + round_idx / 3
    log.append(round_idx, "eval", {"point": "before_cai", "eval/hhh_accuracy": figure, "eval/mt_bench": None})
    log.append(round_idx, "eval", {"point": "after_cai", "eval/hhh_accuracy": figure * 1e-300})
    figures = {"client/loss": figure**0.5, "client/num_rows": 2**53 + round_idx, "time/train_s": 0.7 + attempt}
    log.append(round_idx, "round", {"global/checksum": "0f", **figures})


def opened(folder: Path, said: Said, *overrides: str) -> WandbStream:
    return WandbStream(folder, made_config(*overrides), said.append)


def records(folder: Path) -> list[dict[str, Any]]:
    """Every record of every session of the run, as wandb's own inspector prints it."""
    run_id = json.loads((folder / "wandb.json").read_text())["id"]
    files = sorted(folder.glob(f"wandb/offline-run-*/run-{run_id}.wandb"))
    return [json.loads(line) for path in files for line in inspected(path).splitlines()]


def history(folder: Path) -> list[tuple[int, dict[str, Any]]]:
    """Steps and figures of all sessions in the order of writing, wandb's own fields left out."""
    steps = [r["history"] for r in records(folder) if r["type"] == "history"]
    return [(step["step"]["num"], {k: v for k, v in step["item"].items() if k not in OWN}) for step in steps]


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENT_S
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def wait_for_files(folder: Path) -> None:
    """Wait until W&B has begun to write."""
    wait_until(lambda: any(folder.glob("wandb/offline-run-*/run-*.wandb")))


def kill_all(stream: WandbStream) -> None:
    """SIGKILL to the child and to wandb's service below it, as when a job is ended with all its processes."""
    process, stream._process = stream._process, None
    assert process is not None
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    assert len(family) > 1, "wandb's service is a child of the child"
    for member in family:
        member.kill()
    process.communicate()


def without_clock(figures: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in figures.items() if not k.startswith(CLOCK_PREFIXES)}


def test_rows_of_a_round_are_merged_and_none_overwrites_another(tmp_path: Path) -> None:
    log = begin(tmp_path / "run")
    add_round(log, 0)
    assert steps_of(log.rows()) == {
        0: {"round": 0, "guard_untuned/f1": 1 / 3, "guard/f1": 2 / 3, "client/num_kept_rows": 7,
            "eval/hhh_accuracy": 100 / 7},
        1: {"round": 1, "eval_before_cai/hhh_accuracy": 0.1, "eval/hhh_accuracy": 0.1 * 1e-300,
            "client/loss": 0.1**0.5, "client/num_rows": 2**53, "time/train_s": 0.7},
    }  # fmt: skip


@pytest.mark.parametrize("num_sessions", [1, 2, 5])
def test_a_run_may_be_killed_in_the_same_round_again_and_again(tmp_path: Path, num_sessions: int) -> None:
    """Each session leaves a row of its start after the same round."""
    log = begin(tmp_path / "run")
    add_round(log, 0)
    for session in range(num_sessions):
        log.append(0, RESUME, {"time/load_s": 1.0 + session, "time/train_s": 0.1 * session})
    found = steps_of(log.rows())[1]
    assert found["time/load_s"] == num_sessions and found["time_round/train_s"] == 0.7
    assert found["time/train_s"] == 0.1 * (num_sessions - 1) and found["client/loss"] == 0.1**0.5
    add_round(log, 1)
    assert set(steps_of(log.rows())) == {0, 1, 2}


def test_every_step_is_there_once_after_kills_cuts_and_resumes(tmp_path: Path, monkeypatch: Any) -> None:
    """Five sessions of one run. What a step holds is what metrics.jsonl holds, bit for bit."""
    for name, value in ODD.items():  # the configuration decides
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    folder, said = tmp_path / "run", Said()
    log = begin(folder)

    first = opened(folder, said)  # rounds 1 and 2, then everything is killed once they are on disk
    for round_idx in (0, 1):
        add_round(log, round_idx)
        first.finished(round_idx)
    add_round(log, 2)  # its rows are there, its checkpoint is not
    wait_for_files(folder)
    wait_until(lambda: len(history(folder)) == 3)
    kill_all(first)
    assert [step for step, _ in history(folder)] == [0, 1, 2]

    log.truncate_after(1)
    second = opened(folder, said)  # told of round 3, and killed before anything can be on disk
    second.finished(1)
    add_round(log, 2)
    add_round(log, 3)  # round 4 has its checkpoint, and the run is killed before it is told
    assert second._process is None or second._process.poll() is None
    second.close()

    third = opened(folder, said)  # back-fills rounds 3 and 4
    third.finished(3)
    third.close()  # an error ends the run
    assert [step for step, _ in history(folder)] == [0, 1, 2, 3, 4]

    log.truncate_after(2)  # checkpoint 4 is damaged: the round is done anew, with other times
    fourth = opened(folder, said)
    fourth.finished(2)
    add_round(log, 3, attempt=1)
    fourth.finished(3)
    add_round(log, 4)
    fourth.finished(4)
    fourth.close({"arm": "FedAvg", "final/hhh_accuracy": 1 / 3})

    runs = folder / "wandb"
    before = sorted(p.name for p in runs.iterdir())
    fifth = opened(folder, said)  # the finished run is started once more: there is nothing to say
    assert fifth.place == f"{runs} (to send it: wandb sync --include-online {runs})"
    fifth.finished(4)
    fifth.close({"arm": "FedAvg"})
    assert sorted(p.name for p in runs.iterdir()) == before

    assert said == []
    found, wanted = history(folder), steps_of(log.rows())
    assert [step for step, _ in found] == [0, 1, 2, 3, 4, 5]
    for step, figures in found:
        assert without_clock(figures) == without_clock(wanted[step])
        assert step == 4 or figures == wanted[step]  # round 4 was done twice
    check_what_else_is_there(folder)


def check_what_else_is_there(folder: Path) -> None:
    runs = [r["run"] for r in records(folder) if r["type"] == "run"]
    assert len({run["run_id"] for run in runs}) == 1 and len(runs) == 3  # the second session had nothing to log
    assert {run["project"] for run in runs} == {"fedsim"} and {run["run_group"] for run in runs} == {"arms"}
    assert all(run["tags"] == ["seed-0"] for run in runs)
    assert all("host" not in run and "git" not in run for run in runs)
    for config in [run["config"]["update"] for run in runs]:
        assert config["federation"] == to_nested(made_config())["federation"]
        assert config["git"] == {"commit": "abc"} and config["num_ranks"] == 2
    summary: dict[str, Any] = {}
    for record in records(folder):
        summary |= record.get("summary", {}).get("update", {})
    assert (summary["arm"], summary["final/hhh_accuracy"]) == ("FedAvg", 1 / 3)
    contents = b"".join(p.read_bytes() for p in (folder / "wandb").rglob("*") if p.is_file())
    assert SECRET.encode() not in contents and b"theirs" not in contents


def test_what_was_not_yet_on_disk_when_all_was_killed_is_streamed_again(tmp_path: Path) -> None:
    """wandb acknowledges a step before it is written; a record of what was acknowledged would lose it."""
    lost = 0
    for attempt in range(20):  # a busy machine may give this process its turn only when all is written
        folder, said = tmp_path / f"run{attempt}", Said()
        add_round(begin(folder), 0)
        first = opened(folder, said)
        first.finished(0)
        wait_for_files(folder)
        kill_all(first)
        lost = 2 - len(history(folder))
        second = opened(folder, said)
        second.finished(0)
        second.close({})
        assert [step for step, _ in history(folder)] == [0, 1] and said == []
        if lost:
            break
    assert lost > 0


def test_a_session_waits_for_what_a_killed_worker_has_sent(tmp_path: Path) -> None:
    """wandb's own program outlives its worker until all is written; who reads the steps meanwhile sends some twice."""
    folder, said = tmp_path / "run", Said()
    log = begin(folder)
    add_round(log, 0)
    first = opened(folder, said)
    first.finished(0)
    wait_for_files(folder)
    assert first._process is not None
    (core,) = psutil.Process(first._process.pid).children(recursive=True)
    core.suspend()
    first._process.kill()
    first._process = None
    add_round(log, 1)
    second = opened(folder, said)
    second.finished(1)
    assert second._process is not None
    waiting = re.compile(rf"-> FLOCK .* {second._process.pid} ")
    sessions = (folder / "wandb").glob
    wait_until(
        lambda: bool(waiting.search(Path("/proc/locks").read_text())) or len(list(sessions("offline-run-*"))) > 1
    )
    assert len(list(sessions("offline-run-*"))) == 1, "the second session has begun"
    core.resume()
    second.close({})
    assert [step for step, _ in history(folder)] == [0, 1, 2] and said == []


def test_a_file_that_is_cut_or_damaged_gives_the_steps_on_it(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    log = begin(folder)
    large = {f"client/loss_{i:05d}": i / 7 for i in range(1000)}  # a step is more than a block of the file
    for round_idx in range(3):
        log.append(round_idx, "round", large)
    stream = opened(folder, Said())
    stream.finished(2)
    stream.close({})
    run_id = json.loads((folder / "wandb.json").read_text())["id"]
    assert written(folder, run_id) == (4, True) and history(folder)[3][1] == {"round": 3, **large}
    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    content = path.read_bytes()
    counts = []
    for size in (0, 7, 5000, *range(40_000, len(content), 40_000)):
        path.write_bytes(content[:size])
        counts.append(len(history(folder)))
        assert written(folder, run_id) == (counts[-1], False)
    assert counts == sorted(counts) and set(counts) >= {0, 1, 2, 3}
    path.write_bytes(content[: len(content) // 2] + b"damage" + content[len(content) // 2 + 6 :])
    assert written(folder, run_id) == (4, True)  # the last step is there
    path.write_bytes(b"another file")
    with pytest.raises(RuntimeError, match=rf"^wandb [\d.]+ cannot inspect {path.name}; restore the file, "):
        written(folder, run_id)


HUNG = "did not end in time"
FAILURES = {
    "not installed": ("raise ModuleNotFoundError('no', name='wandb')", "wandb is not installed"),
    "init raises": ("FAKE.at_init = boom", "RuntimeError: the server said no"),
    "log raises": ("FAKE.at_log = boom", "RuntimeError: the server said no"),
    "finish raises": ("FAKE.at_finish = boom", "RuntimeError: the server said no"),
    "init hangs": ("FAKE.at_init = hang", HUNG),
    "log hangs": ("FAKE.at_log = hang", HUNG),
    "finish hangs": ("FAKE.at_finish = hang", HUNG),
    "another id": ("Run.id = 'theirs'", r"wandb gives the run the id 'theirs' instead of '[0-9a-f]{8}'"),
    "it dies": ("FAKE.at_log = die", "its process ended with status 3"),
    "exit": ("FAKE.at_log = leave", "its process ended with status 1"),
}

FAKE = """
import json, os, sys, time
def boom(): raise RuntimeError('the server\\nsaid no')
def hang(): time.sleep(60)
def die(): os._exit(3)
def leave(): sys.exit(1)
def nothing(): pass
class FAKE:
    at_init = at_log = at_finish = nothing
def note(kind, value):
    with open(os.environ['FAKE_LOG'], 'a') as file:
        file.write(json.dumps([kind, value]) + '\\n')
class Summary:
    def update(self, values): note('summary', values)
class Run:
    starting_step = int(os.environ.get('FAKE_STEP', '0'))
    id = None
    summary = Summary()
    def log(self, figures, step, commit):
        FAKE.at_log(); note('log', [step, figures, commit])
    def finish(self, exit_code):
        FAKE.at_finish(); note('finish', exit_code)
def Settings(**settings):
    note('settings', settings)
    return 'settings'
def teardown():
    note('teardown', None)
def init(**settings):
    print('noise'); FAKE.at_init(); note('init', settings)
    note('environment', {name: value for name, value in os.environ.items() if name.startswith('WANDB_')})
    Run.id = Run.id or settings['id']
    return Run()
"""


@pytest.fixture()
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """``fake(line)``: puts a made-up wandb in front of the real one; returns the file that its calls are noted in."""

    def made(line: str) -> Path:
        package = tmp_path / "fake" / "wandb"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text(f"{FAKE}\n{line}\n")
        monkeypatch.setenv("PYTHONPATH", str(package.parent))
        monkeypatch.setenv("FAKE_LOG", str(tmp_path / "calls"))
        return tmp_path / "calls"

    return made


def calls(file: Path, kind: str) -> list[Any]:
    noted = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return [value for name, value in noted if name == kind]


@pytest.mark.parametrize("failure", FAILURES)
def test_a_failure_of_wandb_is_one_line_and_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fake: Callable[[str], Path], capfd: Any, failure: str
) -> None:
    line, reason = FAILURES[failure]
    fake(line)
    monkeypatch.setattr(wandb_stream, "LIMIT_S", {"offline": 2.0, "online": 2.0})
    folder, said = tmp_path / "run", Said()
    log = begin(folder)
    stream = opened(folder, said, "wandb.mode=online")  # offline would need wandb's reader
    began = time.monotonic()
    for round_idx in range(3):
        add_round(log, round_idx)
        stream.finished(round_idx)
    assert time.monotonic() - began < 10, "rounds never wait: what hangs here hangs for a minute"
    stream.close({"arm": "FedAvg"})
    stream.finished(2)
    stream.close({"arm": "FedAvg"})
    assert time.monotonic() - began < 30
    assert len(said) == 1
    assert re.search(reason, said[0]) and "goes on without it" in said[0]
    assert capfd.readouterr() == ("", "")


def test_a_failure_is_said_at_the_next_round(tmp_path: Path, fake: Callable[[str], Path]) -> None:
    fake("FAKE.at_init = boom")
    folder, said = tmp_path / "run", Said()
    add_round(begin(folder), 0)
    stream = opened(folder, said, "wandb.mode=online")
    stream.finished(0)
    assert stream._process is not None
    stream._process.wait(timeout=20)
    stream.finished(0)
    assert len(said) == 1
    stream.finished(0)
    stream.close({})
    assert len(said) == 1 and stream.place is None


def test_the_wait_at_the_end_leaves_the_other_ranks_time(tmp_path: Path, fake: Callable[[str], Path]) -> None:
    """They wait in a broadcast that ends the run after ``parallel.timeout_s``."""
    fake("FAKE.at_init = hang")
    folder, said = tmp_path / "run", Said()
    add_round(begin(folder), 0)
    stream = opened(folder, said, "wandb.mode=online", "parallel.timeout_s=8")
    stream.finished(0)
    began = time.monotonic()
    stream.close({"arm": "FedAvg"})
    assert time.monotonic() - began < 7.2 and len(said) == 1 and HUNG in said[0]


def test_a_child_that_hangs_does_not_outlive_its_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fake: Callable[[str], Path]
) -> None:
    """The run is killed while W&B's start hangs: nobody is left to end the child."""
    fake("FAKE.at_init = hang")
    monkeypatch.setattr(wandb_stream, "LIMIT_S", {"online": 0.5})
    folder = tmp_path / "run"
    add_round(begin(folder), 0)
    stream = opened(folder, Said(), "wandb.mode=online")
    stream.finished(0)
    child = stream._process
    assert child is not None and child.stdin is not None
    child.stdin.close()  # what a parent's end does
    assert child.wait(timeout=30) == -signal.SIGALRM


def test_online_goes_on_where_the_server_is(
    tmp_path: Path, fake: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three sessions: the id, the mode and the names stay; the server says which steps it has."""
    noted = fake("")
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    monkeypatch.setenv("WANDB_RUN_ID", "theirs")
    folder, said = tmp_path / "run", Said()
    log = begin(folder)
    add_round(log, 0)
    words = ["wandb.mode=online", "wandb.project=mine", "wandb.entity=team"]
    first = opened(folder, said, *words)
    first.finished(0)
    first.close()
    monkeypatch.setenv("FAKE_STEP", "2")
    add_round(log, 1)
    second = opened(folder, said, *words)
    second.finished(1)
    second.close({"arm": "FedAvg"})
    monkeypatch.setenv("FAKE_STEP", "3")
    third = opened(folder, said, *words)  # the finished run is started once more
    third.finished(1)
    third.close({"arm": "FedAvg"})
    assert said == []
    one, two, three = calls(noted, "init")
    assert one == two == three
    kept = {name: one[name] for name in ("mode", "project", "entity", "group", "tags", "name", "resume", "dir")}
    assert kept == {"mode": "online", "project": "mine", "entity": "team", "group": "arms", "tags": ["seed-0"],
                    "name": "tracked", "resume": "allow", "dir": str(folder)}  # fmt: skip
    assert one["id"] == json.loads((folder / "wandb.json").read_text())["id"]
    wanted = steps_of(log.rows())
    assert calls(noted, "log") == [[step, wanted[step], True] for step in (0, 1, 2)]
    assert one["config"]["num_ranks"] == 2 and one["config"]["wandb"]["entity"] == "team"
    assert calls(noted, "environment") == [{"WANDB_API_KEY": SECRET, "WANDB_ERROR_REPORTING": "false"}] * 3
    assert calls(noted, "finish") == [1, 0, 0]
    kinds = [json.loads(line)[0] for line in noted.read_text().splitlines()]
    assert kinds.count("teardown") == 3 and kinds[-2:] == ["finish", "teardown"]
    for settings in calls(noted, "settings"):
        assert settings["silent"] and settings["console"] == "off" and not settings["save_code"]
        assert settings["disable_git"] and settings["x_disable_stats"] and settings["x_disable_machine_info"]
        assert settings["host"] == "" and settings["init_timeout"] == settings["finish_timeout"] == PATIENT_S


class Second(OneRank):
    """Rank 1 of a world."""

    rank = 1
    is_main = False


@pytest.mark.parametrize(("ranks", "mode"), [(Second(), "online"), (OneRank(), "off")], ids=["rank 1", "off"])
def test_only_rank_0_streams_and_off_is_off(
    tmp_path: Path, fake: Callable[[str], Path], ranks: OneRank, mode: str
) -> None:
    noted = fake("")
    config = load_config(None, [f"record.dir={tmp_path}", "name=run", f"wandb.mode={mode}"])
    record = RunRecord(config, ranks, synchronize=False)
    begin(record.folder)
    record.counts(-1)
    assert record.stream._process is None and record.stream.place is None
    record.release()
    assert not noted.exists()


def claimed(config: Config) -> RunRecord:
    made = RunRecord(config, OneRank(), synchronize=False)
    made.claim()
    return made


def test_a_directory_that_starts_anew_gets_another_id(tmp_path: Path) -> None:
    config = load_config(None, [f"record.dir={tmp_path}", "name=run"])
    claimed(config).release()
    (tmp_path / "run" / "wandb.json").write_text('{"id": "old"}')
    claimed(config).release()
    assert not (tmp_path / "run" / "wandb.json").exists()
    assert {"wandb.mode", "wandb.project", "wandb.entity", "wandb.group", "wandb.tags"} <= FREE_KEYS


class Stopped(Exception):
    """The interruption that a test injects."""


def test_a_real_run_that_is_stopped_and_resumed(
    tmp_path: Path, square_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stopped right after the second round's checkpoint, before W&B hears of it."""
    monkeypatch.setattr(finish, "write_plots", lambda *_: [])
    brief = ["guard.kind=noisy_oracle", "cai.iterations=1", "eval.limit=1", "local.steps=1"]
    places = [f"data.square={square_file}", f"record.dir={tmp_path}", f"record.artefacts={tmp_path / 'artefacts'}"]

    def simulation() -> Simulation:
        config = load_config(SMALL, [*brief, *places, "wandb.mode=offline"])
        return Simulation(config, World(OneRank(), torch.device("cpu"), exact=True))

    stopped = simulation()
    save = stopped.record.checkpoints.save

    def stopping(checkpoint: Checkpoint) -> None:
        save(checkpoint)
        if checkpoint.round_idx == 1:
            raise Stopped

    stopped.record.checkpoints.save = stopping  # type: ignore[method-assign]
    with pytest.raises(Stopped):
        stopped.run()
    folder = tmp_path / "small"
    assert [step for step, _ in history(folder)] == [0, 1]
    resumed = simulation()
    close, seen = resumed.record.stream.close, []

    def closing(summary: Any = None) -> None:
        seen.append((summary is not None, (folder / "summary.md").exists(), "Written:" in capsys.readouterr().out))
        close(summary)

    resumed.record.stream.close = closing  # type: ignore[method-assign]
    resumed.run()
    assert seen[0] == (True, True, True), "the summary is written and the table printed before W&B is waited for"
    rows: list[Row] = read_rows(folder / "metrics.jsonl")
    wanted = steps_of(rows)
    assert history(folder) == [(step, wanted[step]) for step in (0, 1, 2, 3)]
    assert "eval_before_cai/hhh_accuracy" in wanted[3] and "eval/hhh_accuracy" in wanted[0]
    assert "W&B" in (folder / "summary.md").read_text(encoding="utf-8")
    (summary,) = [r["summary"]["update"] for r in records(folder) if "arm" in r.get("summary", {}).get("update", {})]
    last = [row for row in rows if row.get("point") == "after_cai"][-1]
    assert summary["final/hhh_accuracy"] == last["eval/hhh_accuracy"]
    assert summary["arm"] == "FedAvg, FL + noisy oracle filter + CAI" and summary["total_s"] > 0
