"""Reads back what a Weights & Biases run has on disk: the history in its ``.wandb`` files.

wandb acknowledges a step before it is written, so that a killed process may lose the newest ones; only the files say
which steps are safe. The format is LevelDB's log: blocks of 32 KiB that hold records of checksum, length and kind, a
long record in several pieces. Each record is one protobuf message of wandb's own definition.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_BLOCK = 32768
_FILE_HEAD = struct.Struct("<4sHB")  # ":W&B", magic, version
_RECORD_HEAD = struct.Struct("<IHB")  # CRC-32 of kind and data, length of the data, kind
_WHOLE, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


def read_history(folder: Path, run_id: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """``(step, figures)`` of every history record of a run, session by session, in the order of writing.

    Args:
        folder: the directory that holds ``offline-run-…`` and ``run-…`` folders.
        run_id: whose; a resumed run has several folders.
    """
    from wandb.proto import wandb_internal_pb2

    messages: Any = wandb_internal_pb2  # its classes are made at import
    paths = folder.glob(f"*run-*-{run_id}*/run-{run_id}.wandb")  # a second session in one second ends in -1
    for path in sorted(paths, key=lambda p: p.parent.name.removeprefix("offline-")):
        for data in _records(path.read_bytes()):
            record = messages.Record.FromString(data)
            if record.WhichOneof("record_type") == "history":
                items = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
                yield record.history.step.num, {name: json.loads(value) for name, value in items.items()}


def _records(content: bytes) -> Iterator[bytes]:
    """Whole records up to the end, or to where a crash or damage cut the file short."""
    if len(content) < _FILE_HEAD.size or _FILE_HEAD.unpack_from(content)[0] != b":W&B":
        return
    place, parts = _FILE_HEAD.size, b""
    while place + _RECORD_HEAD.size <= len(content):
        room = _BLOCK - place % _BLOCK
        if room < _RECORD_HEAD.size:  # too little for a head: the block's end is padding
            place += room
            continue
        checksum, length, kind = _RECORD_HEAD.unpack_from(content, place)
        data = content[place + _RECORD_HEAD.size : place + _RECORD_HEAD.size + length]
        if len(data) < length or zlib.crc32(data, zlib.crc32(bytes([kind]))) != checksum:
            return
        place += _RECORD_HEAD.size + length
        parts = data if kind in (_WHOLE, _FIRST) else parts + data
        if kind in (_WHOLE, _LAST):
            yield parts
