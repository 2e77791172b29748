"""Requirements of an architecture: no draws of its own, and packed rows and cached steps that equal plain rows."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Final

import numpy as np
import torch
from torch.nn.modules.dropout import _DropoutNd
from transformers import PretrainedConfig, PreTrainedModel

from fedsim.attention.backends import Backend, Scores
from fedsim.attention.forward import Place, Rows, packed_hidden, packed_logits, text_decoder
from fedsim.attention.head import head_logits
from fedsim.attention.kv_cache import Extending, Slots, Stepping
from fedsim.attention.prefix import candidate_logits, read_head
from fedsim.attention.spans import Spans
from fedsim.base.errors import ModelError, reason
from fedsim.model.quantised import quantisation

LIMITS: Final = {torch.bfloat16: 0.3, torch.float16: 0.1}
"""Relative distance of a token's logits that rounding may make; of wider types 1e-3. What leaks or is left out makes
about 1: it is another context."""

NUM_CANDIDATES: Final = 64
"""Tokens of the vocabulary, evenly apart, whose logits behind a shared head are compared."""

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


def check_fitness(base: PreTrainedModel, rows: list[list[int]], *, trains: bool = True) -> None:
    """Compare a model's logits through fedsim's attention with those of its own, plain forward pass, row by row.

    Packed rows are compared in evaluation and in training, with a head that works in chunks, and so is the gradient of
    a weight before the first attention; then cached steps (:func:`_decoded`) and tails behind a shared head
    (:func:`_behind_head`). State that is carried from row to row, masks and positions of the model's own, draws in
    training, caches that hold something else than keys and values, and a head that works in another way all show. A
    window that is longer than the rows does not: each layer must pass on the window that the configuration names. No
    number is drawn.

    Args:
        base: in evaluation mode, its attention fedsim's; left as it is.
        rows: 4 to 12 tokens each, of different lengths; two or more rows.
        trains: a gradient is compared too.

    Raises:
        ModelError: it does not fit.
    """
    for module in base.modules():
        if isinstance(module, _DropoutNd):  # one that no configuration speaks of
            module.p = 0.0
    name = type(base).__name__
    check_kind(base)
    try:
        want = _plain(base, rows)
        layout = _Noting(Spans([len(row) for row in rows], device=base.device))
        _compare(_packed(base, rows, layout), want, f"{name}: packed rows are not what each row is alone")
        _check_windows(base, layout.windows)
        with _training(base):
            trained = _packed(base, rows, layout)
        _compare(trained, want, f"{name}: computes something else, or at random, in training")
        if trains and quantisation(base.config) is None:  # packed weights have no gradient
            _check_gradient(base, rows, layout)
    except ModelError:
        raise
    except Exception as error:  # whatever another architecture does with arguments that it does not know
        raise ModelError(f"{name}: cannot run packed rows ({reason(error)}); {WHICH}") from error
    try:
        _check_decoding(base, rows, want.split([len(row) for row in rows]))
    except ModelError:
        raise
    except Exception as error:  # such as keys and values of other shapes than the cache's
        raise ModelError(f"{name}: cannot decode with a cache ({reason(error)}); {WHICH}") from error


def check_kind(base: PreTrainedModel) -> None:
    """Refuse what the class and the configuration already show and what a few tokens may not; no number is looked at.

    Raises:
        ModelError: state from token to token, or attention to chosen positions or in chunks.
    """
    name = type(base).__name__
    if base._is_stateful:  # its first tokens' state is small, bf16's rounding may hide it
        raise ModelError(f"{name}: carries state from token to token, and so from row to row; {WHICH}")
    config = base.config.get_text_config()
    longest = _longest(config)
    chunk = getattr(config, "attention_chunk_size", None) or longest
    if "chunked_attention" in (getattr(config, "layer_types", None) or ()) and chunk < longest:
        raise ModelError(f"{name}: attention_chunk_size={chunk}: fedsim knows no chunked attention; {WHICH}")
    chosen = getattr(config, "index_topk", None) or longest
    if chosen < longest:
        raise ModelError(f"{name}: index_topk={chosen}: fedsim knows no attention to chosen positions; {WHICH}")


def _longest(config: PretrainedConfig) -> int:
    return int(getattr(config, "max_position_embeddings", None) or 1 << 30)


def _check_decoding(base: PreTrainedModel, rows: list[list[int]], want: Sequence[torch.Tensor]) -> None:
    """Compare decoding with a cache, and scoring behind a shared head, with plain passes.

    Args:
        want: logits ``[length, vocabulary]`` of each row.
    """
    name = type(base).__name__
    places, found = _decoded(base, rows)
    wanted = torch.stack([want[row][place] for row, place in places])
    _compare(found, wanted, f"{name}: its decoding with a cache differs from its plain forward pass")

    candidates = sorted({i * wanted.shape[1] // NUM_CANDIDATES for i in range(NUM_CANDIDATES)})
    ends, found = _behind_head(base, rows[0], candidates)
    wanted = want[0][ends][:, candidates]
    _compare(found.to(wanted), wanted, f"{name}: its scoring behind a shared head differs from its plain forward pass")


@torch.no_grad()
def _decoded(base: PreTrainedModel, rows: list[list[int]]) -> tuple[list[tuple[int, int]], torch.Tensor]:
    """Give the rows to the cache of :mod:`fedsim.generate.decode`: prompts, a further turn, then single tokens.

    Returns:
        (row, place) of each token whose logits were computed, and the logits, ``[tokens, vocabulary]``.
    """
    num_rows, num_steps = len(rows), min(3, min(map(len, rows)) // 2)
    slots = Slots(num_rows, base.device)
    slots.reserve(max(map(len, rows)))
    places: list[tuple[int, int]] = []
    parts: list[torch.Tensor] = []

    # Two passes of several tokens each: the first half of every row, then all but its last num_steps tokens.
    read = [len(row) - num_steps for row in rows]
    for ends in ([length - length // 2 for length in read], read):
        news = [row[begin:end] for row, begin, end in zip(rows, slots.lengths, ends, strict=True)]
        ids = torch.tensor([token for new in news for token in new], device=base.device)
        layout = Extending(slots, range(num_rows), [len(new) for new in news])
        last = layout.spans.query_starts[1:].long() - 1
        parts.append(packed_logits(base, ids, layout.spans.positions, layout, last))
        places += [(row, end - 1) for row, end in enumerate(ends)]
        slots.lengths = list(ends)

    # Steps of one token a row.
    index = torch.arange(num_rows, device=base.device)
    for _ in range(num_steps):
        where = torch.tensor(slots.lengths, device=base.device)
        ids = torch.tensor([row[end] for row, end in zip(rows, slots.lengths, strict=True)], device=base.device)
        stepping = Stepping(slots, index, where, max(slots.lengths) + 1)
        parts.append(packed_logits(base, ids, where[None], stepping, index))
        places += list(enumerate(slots.lengths))
        slots.lengths = [length + 1 for length in slots.lengths]
    return places, torch.cat(parts)


def _behind_head(base: PreTrainedModel, row: list[int], candidates: list[int]) -> tuple[list[int], torch.Tensor]:
    """Score two beginnings of a row behind their common head, as the guard scores its prompts.

    Returns:
        The place of each beginning's last token, and logits ``[2, candidates]``.
    """
    middle = len(row) // 2
    ends = [len(row), middle + 1]
    tails = [np.array(row[middle:end]) for end in ends]
    found = candidate_logits(base, read_head(base, np.array(row[:middle])), tails, candidates)
    return [end - 1 for end in ends], found


class _Noting(Rows):
    """Rows that note the window of each layer."""

    def __init__(self, spans: Spans) -> None:
        super().__init__(spans)
        self.windows: dict[int, int | None] = {}

    def attend(
        self,
        backend: Backend,
        place: Place,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scores: Scores,
    ) -> torch.Tensor:
        """See :class:`fedsim.attention.forward.Layout`."""
        self.windows[place.layer] = scores.window
        return super().attend(backend, place, query, key, value, scores)


@torch.no_grad()
def _packed(base: PreTrainedModel, rows: list[list[int]], layout: _Noting) -> torch.Tensor:
    ids = torch.tensor([token for row in rows for token in row], device=base.device)
    return head_logits(base, packed_hidden(base, ids, layout.spans.positions, layout))


@torch.no_grad()
def _plain(base: PreTrainedModel, rows: list[list[int]]) -> torch.Tensor:
    """Row by row through transformers' eager attention and masks."""
    with _own_attention(base):
        return torch.cat([_alone(base, row) for row in rows])


def _alone(base: PreTrainedModel, row: list[int]) -> torch.Tensor:
    """Logits ``[length, vocabulary]`` of a row by the model's own forward pass."""
    logits: torch.Tensor = base(input_ids=torch.tensor([row], device=base.device), use_cache=False).logits[0]
    return logits


@contextlib.contextmanager
def _own_attention(base: PreTrainedModel) -> Iterator[None]:
    """Transformers' eager attention in place of fedsim's."""
    ours: Any = base.config._attn_implementation
    base.set_attn_implementation("eager")
    try:
        yield
    finally:
        base.set_attn_implementation(ours)


def _check_gradient(base: PreTrainedModel, rows: list[list[int]], layout: _Noting) -> None:
    """Compare the gradient of the next tokens' log-probabilities by one weight: packed rows against rows alone."""
    weight = _first_matrix(base)
    was_trained = weight.requires_grad
    weight.requires_grad_()
    try:
        with torch.enable_grad():
            # All rows at once, in training mode, as a step of training has them.
            ids = torch.tensor([token for row in rows for token in row], device=base.device)
            with _training(base):
                logits = head_logits(base, packed_hidden(base, ids, layout.spans.positions, layout))
                losses = [_loss(part, row) for part, row in zip(logits.split([*map(len, rows)]), rows, strict=True)]
                (found,) = torch.autograd.grad(torch.stack(losses).sum(), weight)
            # Row by row.
            with _own_attention(base):
                wanted = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
                for row in rows:
                    wanted += torch.autograd.grad(_loss(_alone(base, row), row), weight)[0]
    finally:
        weight.requires_grad_(was_trained)
    distance = float((found.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-12))
    limit = LIMITS.get(weight.dtype, 1e-3)
    if not distance <= limit:  # NaN too
        raise ModelError(
            f"{type(base).__name__}: the gradient of packed rows is not that of each row alone (a weight of the first "
            f"layer: {distance:.2g} apart, {limit:g} is allowed); {WHICH}"
        )


def _first_matrix(base: PreTrainedModel) -> torch.nn.Parameter:
    """A matrix of the first layer, of queries as a rule."""
    num_layers = int(base.config.get_text_config().num_hidden_layers)
    for module in text_decoder(base).modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == num_layers:
            return next(p for p in module[0].parameters() if p.dim() == 2 and p.is_floating_point())
    return next(p for p in text_decoder(base).parameters() if p.dim() == 2 and p.is_floating_point())


def _loss(logits: torch.Tensor, row: list[int]) -> torch.Tensor:
    """Sum of −log p of each token after the first."""
    after = torch.tensor(row[1:], device=logits.device)
    wide = torch.promote_types(logits.dtype, torch.float32)
    return torch.nn.functional.cross_entropy(logits[:-1].to(wide), after, reduction="sum")


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
    longest = _longest(config)
    types = getattr(config, "layer_types", None)
    sliding = getattr(config, "sliding_window", None) or 1 << 30
    for layer, window in windows.items():
        kind = types[layer] if types else "sliding_attention"
        if kind == "sliding_attention" and sliding < longest and window != sliding:
            raise ModelError(
                f"{type(base).__name__}: sliding_window={sliding}, but its layer {layer} does not tell its attention "
                f"so; {WHICH}"
            )
