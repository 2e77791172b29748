"""Writing of safetensors files with the umask's mode, as for every other file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save


def write_tensors(
    path: Path,
    tensors: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write or replace a safetensors file; a reader sees the old file or the whole new one.

    safetensors' own ``save_file`` ignores the umask and makes its file with mode 0600, which other
    users cannot read.
    """
    partial = path.with_name(f".{path.name}.partial")
    content = save(dict(tensors), None if metadata is None else dict(metadata))
    partial.write_bytes(content)
    os.replace(partial, path)
