"""What fedsim asks of an architecture: no draws of its own, and packed rows that equal plain, separate ones."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Final

import torch
from torch.nn.modules.dropout import _DropoutNd
from transformers import PretrainedConfig, PreTrainedModel

from fedsim.attention.backends import Backend, Scores
from fedsim.attention.forward import Rows, head_logits, packed_hidden
from fedsim.attention.spans import Spans
from fedsim.errors import ModelError

LIMITS: Final = {torch.bfloat16: 0.3, torch.float16: 0.1}
"""Relative distance of a token's logits that rounding may make; of wider types 1e-3. What leaks or is left out makes
about 1: it is another context."""

WHICH: Final = "use a decoder such as Llama, Qwen, Mistral or Gemma"


def switch_dropout_off(config: PretrainedConfig) -> dict[str, float]:
    """Set every dropout in a configuration to 0, so that LoRA's alone is left, whose draws have keys.

    Returns:
        What was switched off, by its name in config.json.

    Raises:
        ModelError: random routing, which some models rely on in evaluation too.
    """
    found: dict[str, float] = {}
    for name, value in list(vars(config).items()):
        if isinstance(value, PretrainedConfig):
            found |= {f"{name}.{inner}": p for inner, p in switch_dropout_off(value).items()}
        elif isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
            continue
        elif "jitter" in name:
            raise ModelError(
                f"{name}={value} in config.json: the model draws its routes in training, which fedsim cannot repeat; "
                f"{WHICH}"
            )
        elif "drop" in name:
            setattr(config, name, 0.0)
            found[name] = float(value)
    return found


def check_fitness(base: PreTrainedModel, rows: list[list[int]]) -> None:
    """Whether packed rows through fedsim's attention give what each gives alone through the model's own, plain one.

    Logits are compared, made as a chunked head makes them, in evaluation and in training. State that is carried from
    row to row, masks and positions of the model's own, draws in training and a head that works in another way all
    show. A window that is longer than the rows does not: each layer must pass on what the configuration says.

    Args:
        base: in evaluation mode, its attention fedsim's; left as it is.
        rows: a few tokens each, two or more rows.

    Raises:
        ModelError: it does not fit.
    """
    for module in base.modules():
        if isinstance(module, _DropoutNd):  # one that no configuration speaks of
            module.p = 0.0
    name = type(base).__name__
    if base._is_stateful:  # its first tokens' state is small, bf16's rounding may hide it
        raise ModelError(f"{name}: carries state from token to token, and so from row to row; {WHICH}")
    try:
        want = _plain(base, rows)
        layout = _Noting(Spans([len(row) for row in rows], device=base.device))
        _compare(_packed(base, rows, layout), want, f"{name}: packed rows are not what each row is alone")
        _check_windows(base, layout.windows)
        with _training(base):
            trained = _packed(base, rows, layout)
        _compare(trained, want, f"{name}: computes something else, or at random, in training")
    except ModelError:
        raise
    except Exception as error:  # whatever another architecture does with arguments that it does not know
        raise ModelError(f"{name}: cannot run packed rows ({type(error).__name__}: {error}); {WHICH}") from error


class _Noting(Rows):
    """Rows that note each layer's window."""

    def __init__(self, spans: Spans) -> None:
        super().__init__(spans)
        self.windows: dict[int, int | None] = {}

    def attend(
        self, backend: Backend, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scores: Scores
    ) -> torch.Tensor:
        """See :class:`fedsim.attention.forward.Layout`."""
        self.windows[layer] = scores.window
        return super().attend(backend, layer, query, key, value, scores)


@torch.no_grad()
def _packed(base: PreTrainedModel, rows: list[list[int]], layout: _Noting) -> torch.Tensor:
    ids = torch.tensor([token for row in rows for token in row], device=base.device)
    return head_logits(base, packed_hidden(base, ids, layout.spans.positions, layout))


@torch.no_grad()
def _plain(base: PreTrainedModel, rows: list[list[int]]) -> torch.Tensor:
    """Row by row through transformers' eager attention and masks."""
    ours: Any = base.config._attn_implementation
    base.set_attn_implementation("eager")
    try:
        one = [base(input_ids=torch.tensor([row], device=base.device), use_cache=False).logits[0] for row in rows]
    finally:
        base.set_attn_implementation(ours)
    return torch.cat(one)


@contextlib.contextmanager
def _training(base: PreTrainedModel) -> Iterator[None]:
    """Training mode; the generators are left as they were."""
    with torch.random.fork_rng([base.device] if base.device.type == "cuda" else []):
        base.train()
        try:
            yield
        finally:
            base.eval()


def _compare(found: torch.Tensor, wanted: torch.Tensor, problem: str) -> None:
    """Each token's logits, without what all of a token's share: softmax does not see it."""
    a, b = (part.double() - part.double().mean(dim=-1, keepdim=True) for part in (found, wanted))
    distance = float(((a - b).norm(dim=-1) / b.norm(dim=-1).clamp_min(1e-12)).max())
    limit = LIMITS.get(wanted.dtype, 1e-3)
    if not distance <= limit:  # NaN too
        raise ModelError(f"{problem} (logits differ by {distance:.2g}, {limit:g} is allowed); {WHICH}")


def _check_windows(base: PreTrainedModel, windows: dict[int, int | None]) -> None:
    """A window that only the model's mask knows would be lost: fedsim lets the model build no mask."""
    config = base.config.get_text_config()
    longest = int(getattr(config, "max_position_embeddings", None) or 1 << 30)
    types = getattr(config, "layer_types", None)
    sliding = getattr(config, "sliding_window", None) or 1 << 30
    chunk = getattr(config, "attention_chunk_size", None) or 1 << 30
    for layer, window in windows.items():
        kind = types[layer] if types else "sliding_attention"
        if kind == "chunked_attention" and chunk < longest:
            raise ModelError(
                f"{type(base).__name__}: attention_chunk_size={chunk}: fedsim knows no chunked attention; {WHICH}"
            )
        if kind == "sliding_attention" and sliding < longest and window != sliding:
            raise ModelError(
                f"{type(base).__name__}: sliding_window={sliding}, but its layer {layer} does not tell its attention "
                f"so; {WHICH}"
            )
