"""A rank's log: where it is, what it leaves when it fails or dies, and what is read of a torn file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsim.base.exit_file import forget_ending, read_ending, write_ending
from fedsim.base.journal import Journal, in_words, last_seen, log_file, read_log

NAMES = st.sampled_from(["local training", "saving", "évaluation"])


def test_begin_and_end_carry_the_place(tmp_path: Path) -> None:
    journal = Journal(3)
    with journal.at(stage="before the directory is known"):
        pass
    journal.open(tmp_path)
    with journal.at(round=2), journal.at(stage="local training"):
        with journal.at(client=7):
            assert in_words(journal.place) == "local training, round 2, client 7"
        journal.write("note", text="x")
    lines = read_log(tmp_path / "logs" / "rank-003.jsonl")
    assert [line["event"] for line in lines] == ["start", "begin", "begin", "begin", "end", "note", "end", "end"]
    assert (lines[3]["client"], lines[4]["client"]) == (7, 7) and "client" not in lines[5] and "round" not in lines[0]
    assert lines[4]["seconds"] >= 0 and journal.place == {}


def test_an_error_knows_the_innermost_place(tmp_path: Path) -> None:
    journal = Journal()
    journal.open(tmp_path)
    error = KeyError("lost")
    with pytest.raises(KeyError), journal.at(round=1), journal.at(stage="local training", client=4):
        raise error
    assert in_words(journal.place_of(error)) == "local training, round 1, client 4"
    assert journal.place_of(ValueError()) == {} == journal.place
    failed = [line for line in read_log(log_file(tmp_path, 0)) if line["event"] == "failed"]
    assert [line.get("client") for line in failed] == [4, None] and failed[0]["error"] == "KeyError"


def test_a_new_session_goes_on_after_a_torn_line(tmp_path: Path) -> None:
    first = Journal()
    first.open(tmp_path)
    first.write("note")
    first.close()
    path = log_file(tmp_path, 0)
    with path.open("ab") as file:
        file.write(b'{"event": "be')
    second = Journal()
    second.open(tmp_path)
    with second.at(stage="saving", round=3):
        pass
    assert [line["event"] for line in read_log(path)] == ["start", "note", "start", "begin", "end"]
    seen = last_seen(tmp_path, 0)
    assert seen.events == ("start", "begin", "end") and in_words(seen.place) == "saving, round 3" and seen.pid > 0


@given(st.lists(st.tuples(NAMES, st.integers(0, 99)), max_size=5), st.floats(0, 1))
def test_a_log_that_is_cut_anywhere_is_read_up_to_there(places: list[tuple[str, int]], share: float) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        journal = Journal()
        journal.open(Path(name))
        for stage, client in places:
            with journal.at(stage=stage, client=client):
                pass
        journal.close()
        path = log_file(Path(name), 0)
        content = path.read_bytes()
        path.write_bytes(content[: int(share * len(content))])
        whole = [json.loads(line) for line in content.decode().splitlines()]
        found = read_log(path)
        assert found == whole[: len(found)] and len(found) >= path.read_bytes().count(b"\n")
        assert last_seen(Path(name), 0).pid in {0, *(line.get("pid", 0) for line in whole)}


def test_the_first_to_tell_the_cause_is_believed(tmp_path: Path) -> None:
    assert read_ending(tmp_path) is None
    assert write_ending(tmp_path, "error", 2, "the cause", {"rank": 1, "stage": "saving", "round": 2})
    assert not write_ending(tmp_path, "stopped", 143, "a consequence", {})
    note = read_ending(tmp_path)
    assert note is not None and (note["message"], note["rank"], note["round"]) == ("the cause", 1, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["exit.json"]
    forget_ending(tmp_path)
    forget_ending(tmp_path)
    assert read_ending(tmp_path) is None
    assert write_ending(tmp_path / "gone", "error", 2, "x", {}), "what no file can tell, the terminal must"
    (tmp_path / "exit.json").write_text('{"reason"')
    assert read_ending(tmp_path) is None
