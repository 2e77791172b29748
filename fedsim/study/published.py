"""Origin of a published study: where, when and by which command its rows in ``docs/results`` were measured."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Final

from fedsim.base.errors import DataError
from fedsim.config import Config
from fedsim.config.measuring import EMBEDDED, HELD_OUT
from fedsim.study.command import HERE
from fedsim.world.questions import FRAMES, HELD_OUT_FRAMES

ORIGINS: Final = "measured.json"
"""File in it: study → :class:`Origin`."""


@dataclass(frozen=True)
class Origin:
    """Where, when and by which command a study was measured.

    Attributes:
        measured: date, machine, versions and commit in one sentence.
        made_by: the command in backticks.
        seeds: of its runs.
        attacks: ``eval.advbench``, of a file without its folder.
        embedded: the model is the tiny one that ships with fedsim.
    """

    measured: str
    made_by: str
    seeds: tuple[int, ...]
    attacks: str
    embedded: bool

    @property
    def setting(self) -> str:
        """Seeds and attacks in a sentence, and which of them the embedded world was developed on."""
        seeds = ", ".join(map(str, self.seeds))
        text = f"{len(self.seeds)} seed(s): {seeds}; attacks: eval.advbench={self.attacks}"
        if not self.embedded:
            return f"{text}."
        known = []
        if set(self.seeds) & set(DEVELOPED_ON):
            known.append("seeds")
        if self.attacks == EMBEDDED:
            known.append("attacks")
        if known:
            return f"{text}, {' and '.join(known)} that the embedded world was developed on."
        return f"{text}, seeds and attacks that nothing in the embedded world was developed on."

    @property
    def prompts(self) -> str:
        """A caution about the intervals; "" where the attacks are not the embedded world's."""
        frames = {EMBEDDED: FRAMES["howto"], HELD_OUT: HELD_OUT_FRAMES}.get(self.attacks)
        if not self.embedded or frames is None:
            return ""
        return (
            f"Prompts are fillings of templates (the attacks of {len(frames)} frames), which the intervals take as "
            "independent: intervals clustered by template would be wider."
        )


DEVELOPED_ON: Final = (0, 1, 2)
"""Seeds on which the embedded world's recipe, schedule and rates were chosen (docs/embedded-world.md)."""


def origin_of(config: Config, seeds: tuple[int, ...], measured: str, made_by: str) -> Origin:
    """The origin of a study whose runs have this configuration but for what it varies."""
    attacks = HERE.sub("…/", config.eval.advbench)
    return Origin(measured, made_by, seeds, attacks, config.model.path == EMBEDDED)


def write_origin(path: Path, study: str, origin: Origin) -> None:
    """Add or replace a study's entry in a file of origins."""
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    found[study] = asdict(origin)
    path.write_text(json.dumps(found, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def read_origin(path: Path, study: str) -> Origin:
    """A study's entry.

    Raises:
        DataError: the file or the entry is missing or malformed.
    """
    try:
        entry = json.loads(path.read_text(encoding="utf-8"))[study]
        found = Origin(**{field.name: entry[field.name] for field in fields(Origin)})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: has no entry of {study} ({error!r}); publish the study again") from error
    return Origin(found.measured, found.made_by, tuple(found.seeds), found.attacks, found.embedded)
