"""Splitting of a SQuARe-format file into client shards, guard rows and CAI rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final

from fedsim import world
from fedsim.base.artefacts import ArtefactStore, file_digest
from fedsim.base.errors import DataError
from fedsim.base.paths import user_path
from fedsim.base.ranks import Ranks
from fedsim.config import Config, DataConfig
from fedsim.data import partition, splits, square
from fedsim.data.prepared import PreparedData
from fedsim.data.square import ArrowRows, SquareFile
from fedsim.data.usable import Tally, has_reply
from fedsim.extend import build

ROWS_VERSION: Final = 1
"""Of tables of SQuARe-format rows (:mod:`fedsim.base.artefacts`)."""

_COUNTS = ("num_bad_labels", "num_blank_questions")
"""Counts of :class:`SquareFile` that are kept beside the rows."""


def embedded_file(
    store: ArtefactStore,
    kind: str,
    name: str,
    write: Callable[[Path], None],
) -> Path:
    """A file of the embedded world, written once."""

    def save(folder: Path, _: None) -> None:
        write(folder / name)

    artefact = store.get(kind, {"name": name}, world.VERSION, lambda: None, save)
    return artefact.folder / name


def _embedded_square(data: DataConfig, store: ArtefactStore) -> Path:
    """The fictional corpus, in the size that the splits ask for."""
    num_red, num_acceptable = embedded_sizes(data)
    is_default = (num_red, num_acceptable) == (world.NUM_RED, world.NUM_ACCEPTABLE)
    name = "square.json" if is_default else f"square-{num_red}-{num_acceptable}.json"
    return embedded_file(
        store,
        "world-square",
        name,
        lambda path: world.write_square(path, num_red=num_red, num_acceptable=num_acceptable),
    )


def embedded_sizes(data: DataConfig) -> tuple[int, int]:
    """Red and acceptable rows of the fictional corpus: the default's, or more if the splits ask.

    Raises:
        DataError: there are not questions for so many rows, and the splits may not be shrunk.
    """
    # Rows that the splits ask for, and those of the default corpus: [red, acceptable].
    demands = _demands(data)
    asked = [sum(d.num_red for d in demands), sum(d.num_acceptable for d in demands)]
    there = [world.NUM_RED, world.NUM_ACCEPTABLE]

    # Whole questions fit less tightly than rows: a label that has to grow gets 2 % to spare.
    more = [0, 0]
    for label in range(2):
        wanted = asked[label]
        if data.group_by_question:
            wanted = wanted * 51 // 50
        if asked[label] > there[label]:
            more[label] = wanted - there[label]

    # The corpus is limited; data.fit shrinks the growth to what there is.
    room, total = world.MAX_ROWS - sum(there), sum(more)
    if total > room:
        if not data.fit:
            spare = ""
            if data.group_by_question:
                spare = ", with some to spare for data.group_by_question"
            raise DataError(
                f"data.square=embedded: has questions for {world.MAX_ROWS:,} rows, and the splits "
                f"ask for {asked[0]:,} red and {asked[1]:,} acceptable ones, which takes a corpus "
                f"of {sum(there) + total:,}{spare}; lower data.federated_rows, data.guard_rows or "
                "data.cai_rows, set data.fit=true, or give a file"
            )
        more = [m * room // total for m in more]
    return there[0] + more[0], there[1] + more[1]


def _demands(data: DataConfig) -> list[splits.Demand]:
    return [
        splits.Demand.of("federated", data.federated_rows, data.federated_red_share),
        splits.Demand.of("guard", data.guard_rows, data.guard_red_share),
        splits.Demand.of("cai", data.cai_rows, data.cai_red_share),
    ]


def prepare_data(config: Config, store: ArtefactStore, ranks: Ranks) -> PreparedData:
    """Read, check, split and partition the rows; the same on every rank.

    Raises:
        DataError: a malformed file, or splits that the file cannot supply.
    """
    data = config.data
    is_shipped = data.square == "embedded"
    source = _embedded_square(data, store) if is_shipped else user_path(data.square)
    digest = ranks.once(lambda: _digest(source))
    read: list[SquareFile] = []

    # The rows as an Arrow table, an artefact: parsed once, mapped into memory by every rank.
    def load() -> SquareFile:
        read.append(square.load_square(source, data.language))
        return read[0]

    artefact = store.get(
        "square-rows",
        {"file": digest, "language": data.language},
        ROWS_VERSION,
        lambda: ranks.once(lambda: load().num_bad_labels),
        lambda folder, num_bad: _write_rows(folder, read[0]),
    )
    table = square.from_arrow(artefact.folder / "rows.arrow")
    num_bad, num_blank = (int((artefact.folder / name).read_text()) for name in _COUNTS)
    return _split(config, source, digest, table, num_bad, num_blank)


def _split(
    config: Config,
    source: Path,
    digest: str,
    table: ArrowRows,
    num_bad: int,
    num_blank: int,
) -> PreparedData:
    """Split the rows by use, partition the federated set, and note what a user should know."""
    data, federation = config.data, config.federation
    rows = table.take(list(range(len(table))))

    # Three disjoint splits: federated, guard and CAI rows.
    demands = _demands(data)
    made = splits.split_rows(
        rows,
        demands,
        config.seed,
        fit=data.fit,
        group_by_question=data.group_by_question,
    )
    parts = {name: [rows[i] for i in places] for name, places in made.parts.items()}
    federated, guard, cai = parts["federated"], parts["guard"], parts["cai"]

    # The federated set by client, as places in it.
    name, sections = federation.partition, {"federation": federation}
    deal = build("federation.partition", name, federation.partition_options, sections)
    dealt = partition.partition_rows(federated, federation.num_clients, deal, name, config.seed)
    shards = []
    for places in dealt:
        shards.append([federated[i] for i in places])

    # Guard rows without a reply have nothing to classify.
    tally = Tally.of(None if has_reply(row.response) else "empty_reply" for row in guard)
    with_reply = [row for row in guard if has_reply(row.response)]

    # Notes for the log and the summary.
    num_red = sum(r.red for r in rows)
    notes = [f"{source.name}: {len(rows)} rows, {num_red} red and {len(rows) - num_red} acceptable"]
    if num_bad:
        notes.append(f"{num_bad} rows were dropped: their label is neither 0 nor 1")
    if num_blank:
        notes.append(f"{num_blank} rows were dropped: their question is blank")
    if made.factor < 1:
        notes.append(
            f"the file is too small for the sizes asked: all splits are shrunk to {made.factor:.1%} (data.fit)",
        )
    sizes = ", ".join(f"{name} {len(part)}" for name, part in made.parts.items())
    notes.append(
        f"splits: {sizes}; left over: {made.leftover_red} red, {made.leftover_acceptable} acceptable",
    )
    num_left = len(federated) - sum(map(len, dealt))
    if num_left > 0:
        notes.append(
            f"federation.partition={name}: gives {num_left} of {len(federated)} rows to no client",
        )
    if tally.num_dropped:
        notes.append(tally.words("guard rows"))
    return PreparedData(source, digest, shards, with_reply, cai or guard, notes, tally)


def _write_rows(folder: Path, file: SquareFile) -> None:
    square.to_arrow(file.rows, folder / "rows.arrow")
    for name in _COUNTS:
        (folder / name).write_text(str(getattr(file, name)))


def _digest(path: Path) -> str:
    try:
        return file_digest(path)
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}); give the path of a SQuARe response file",
        ) from error
