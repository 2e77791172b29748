"""CAI conversations of a run: generated once by the pretrained model, an artefact runs share."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, Final, Literal, cast

from fedsim.base.artefacts import ArtefactStore, file_digest
from fedsim.base.errors import ConfigError
from fedsim.base.paths import user_path
from fedsim.config import Config
from fedsim.data.square import SquareRow
from fedsim.generate.engine import Engine, Sampling
from fedsim.safety import constitution
from fedsim.safety.cai_data import (
    CaiRow,
    generate_conversations,
    load_conversations,
    save_conversations,
)

CONSTITUTIONS = Path(__file__).parents[1] / "configs" / "constitution"
VERSION: Final = 1
"""Of CAI conversations (:mod:`fedsim.base.artefacts`)."""


def cai_conversations(
    config: Config,
    writer: Engine,
    rows: list[SquareRow],
    store: ArtefactStore,
    facts: dict[str, Any],
) -> list[CaiRow]:
    """Return three-turn conversations from the questions of ``rows``, an artefact runs share.

    Args:
        config: the run's configuration.
        writer: the engine, holding the pretrained model.
        rows: their questions begin the conversations.
        store: artefacts.
        facts: further inputs that the texts depend on: model and data hashes, device kind, threads.

    Raises:
        ConfigError: ``cai.constitution`` names no file.
        DataError: the constitution is malformed.
    """
    cai = config.cai
    path = constitution_file(cai.constitution)
    principles = constitution.load_constitution(path)
    names = ("first_turn", "temperature", "max_new_tokens")
    settings = {name: value for name, value in asdict(cai).items() if name in names}
    # Everything that decides the texts; the artefact's key is its digest.
    depends = {
        "seed": config.seed,
        "rows": [row.row_id for row in rows],
        "language": config.data.language,
        "constitution": file_digest(path),
        "batch_size": config.eval.batch_size,
        "max_context": config.model.max_context,
        **settings,
        **facts,
    }
    first_turn = cast(Literal["model", "dataset"], cai.first_turn)
    sampling = Sampling(cai.temperature, cai.max_new_tokens)

    def generate() -> list[CaiRow]:
        return generate_conversations(writer, rows, principles, sampling, first_turn=first_turn)

    def save(folder: Path, conversations: list[CaiRow]) -> None:
        save_conversations(conversations, folder / "conversations.jsonl")

    artefact = store.get("cai-conversations", depends, VERSION, generate, save)
    return load_conversations(artefact.folder / "conversations.jsonl")


def constitution_file(name: str) -> Path:
    """Return the file that ``cai.constitution`` names: one shipped with fedsim, or a path.

    Raises:
        ConfigError: neither exists.
    """
    shipped = CONSTITUTIONS / f"{name}.json"
    if shipped.is_file():
        return shipped
    path = user_path(name)
    if not path.is_file():
        names = ", ".join(sorted(p.stem for p in CONSTITUTIONS.glob("*.json")))
        rule = f"is neither a file nor one that ships with fedsim ({names})"
        raise ConfigError(f"cai.constitution={name!r}: {rule}")
    return path
