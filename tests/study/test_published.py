"""Where published rows were measured: settings in words, and files that come back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from fedsim.base.errors import DataError
from fedsim.config import load_config
from fedsim.study.published import Origin, origin_of, read_origin, write_origin

HELD = Origin("Measured here.", "`x`", (100, 101), "embedded-held-out", True)


def test_seeds_and_attacks_of_development_are_named() -> None:
    assert HELD.setting.endswith("seeds and attacks that nothing in the embedded world was developed on.")
    assert replace(HELD, seeds=(2, 100)).setting.endswith("held-out, seeds that the embedded world was developed on.")
    seen = replace(HELD, attacks="embedded")
    assert seen.setting.endswith("=embedded, attacks that the embedded world was developed on.")
    both = replace(seen, seeds=(0, 1))
    assert both.setting.endswith("=embedded, seeds and attacks that the embedded world was developed on.")
    assert replace(HELD, attacks="a.csv").setting.endswith("nothing in the embedded world was developed on.")
    assert (
        replace(HELD, attacks="a.csv", embedded=False).setting == "2 seed(s): 100, 101; attacks: eval.advbench=a.csv."
    )


def test_template_fillings_are_named_in_the_embedded_world_alone() -> None:
    assert "(the attacks of 6 frames)" in HELD.prompts and "would be wider" in HELD.prompts
    assert replace(HELD, embedded=False).prompts == replace(HELD, attacks="a.csv").prompts == ""


def test_a_files_folder_is_left_out() -> None:
    config = load_config(None, ["eval.advbench=/home/me/a.csv", "model.path=/models/8b"])
    assert origin_of(config, (1,), "m", "c") == Origin("m", "c", (1,), "…/a.csv", False)


def test_entries_come_back_and_do_not_replace_others(tmp_path: Path) -> None:
    path = tmp_path / "measured.json"
    write_origin(path, "a", HELD)
    write_origin(path, "b", replace(HELD, seeds=(7,)))
    assert read_origin(path, "a") == HELD and read_origin(path, "b").seeds == (7,)
    with pytest.raises(DataError, match=r"measured\.json: has no entry of c .*publish the study again"):
        read_origin(path, "c")
