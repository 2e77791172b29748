"""Origin of a published study: machine, date and command of its rows in ``docs/results``."""

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
    """Machine, date and command of a study.

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
        """Seeds and attacks in a sentence, with those that the embedded world was developed on."""
        seeds = ", ".join(map(str, self.seeds))
        text = f"{len(self.seeds)} seed(s): {seeds}; attacks: eval.advbench={self.attacks}"
        if not self.embedded:
            return f"{text}."

        # Seeds or attacks that were seen while the embedded world was developed.
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
            f"Prompts are fillings of templates (the attacks of {len(frames)} frames), which the "
            "intervals take as independent: intervals clustered by template would be wider."
        )


DEVELOPED_ON: Final = (0, 1, 2)
"""Seeds on which the embedded world was developed (docs/embedded-world.md)."""


def origin_of(config: Config, seeds: tuple[int, ...], measured: str, made_by: str) -> Origin:
    """The origin of a study's rows; ``config`` is that of any of its runs."""
    attacks = HERE.sub("…/", config.eval.advbench)
    return Origin(measured, made_by, seeds, attacks, config.model.path == EMBEDDED)


def write_origin(path: Path, study: str, origin: Origin) -> None:
    """Add or replace a study's entry in a file of origins."""
    found = {}
    if path.is_file():
        found = json.loads(path.read_text(encoding="utf-8"))
    found[study] = asdict(origin)
    path.write_text(
        json.dumps(found, indent=2, sort_keys=True, ensure_ascii=False) + "\n",
        encoding="utf-8",
    )


def read_origin(path: Path, study: str) -> Origin:
    """A study's entry.

    Raises:
        DataError: the file or the entry is missing or malformed.
    """
    try:
        entry = json.loads(path.read_text(encoding="utf-8"))[study]
        found = Origin(**{field.name: entry[field.name] for field in fields(Origin)})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path}: has no entry of {study} ({error!r}); publish the study again",
        ) from error
    return Origin(found.measured, found.made_by, tuple(found.seeds), found.attacks, found.embedded)
