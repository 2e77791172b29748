"""Requirements of an architecture: no draws, packed rows and cached steps as plain rows."""

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
"""Relative distance of a token's logits that rounding may cause; of wider types 1e-3.

Tokens that leak in or are left out make another context, and a distance of about 1.
"""

NUM_CANDIDATES: Final = 64
"""Tokens of the vocabulary, evenly apart, whose logits behind a shared prefix are compared."""

WHICH: Final = "use a decoder such as Llama, Qwen, Mistral or Gemma"


def switch_dropout_off(config: PretrainedConfig) -> dict[str, float]:
    """Set every dropout in a configuration to 0: only LoRA's is left, whose draws have keys.

    Args:
        config: changed in place.

    Returns:
        Rates that were switched off, by their names in config.json.

    Raises:
        ModelError: random routing, which some models rely on in evaluation too.
    """
    found: dict[str, float] = {}
    for name, value in list(vars(config).items()):
        if isinstance(value, PretrainedConfig):
            for inner, rate in switch_dropout_off(value).items():
                found[f"{name}.{inner}"] = rate
        elif isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
            continue
        elif "jitter" in name:
            problem = "the model draws its routes in training, which fedsim cannot repeat"
            raise ModelError(f"{name}={value} in config.json: {problem}; {WHICH}")
        elif "drop" in name:
            setattr(config, name, 0.0)
            found[name] = float(value)
    return found


def check_fitness(base: PreTrainedModel, rows: list[list[int]], *, trains: bool = True) -> None:
    """Compare a model's logits through fedsim's attention with those of plain forward passes.

    Packed rows are compared in evaluation and in training, with an LM head that works in chunks,
    and so is the gradient of a weight before the first attention; then cached steps
    (:func:`_decoded`) and tails behind a shared prefix (:func:`_behind_head`). This finds state
    that is carried from row to row, the model's own masks and positions, draws in training, caches
    that hold something else than keys and values, and an LM head that works in another way. It
    cannot find a window that is longer than the rows: each layer must pass on the window that the
    configuration names. No number is drawn.

    Args:
        base: in evaluation mode, with fedsim's attention; left as it is.
        rows: token ids, 4 to 12 a row, of different lengths; two or more rows.
        trains: compare a gradient too.

    Raises:
        ModelError: it does not fit.
    """
    for module in base.modules():
        if isinstance(module, _DropoutNd):  # one that no configuration names
            module.p = 0.0
    name = type(base).__name__
    check_kind(base)

    # Packed rows against row by row: logits [tokens, vocabulary], in evaluation and in training.
    lengths = [len(row) for row in rows]
    try:
        want = _plain(base, rows)
        layout = _Noting(Spans(lengths, device=base.device))
        found = _packed(base, rows, layout)
        _compare(found, want, f"{name}: packed rows differ from each row by itself")
        _check_windows(base, layout.windows)
        with _training(base):
            trained = _packed(base, rows, layout)
        _compare(trained, want, f"{name}: computes something else, or at random, in training")
        if trains and quantisation(base.config) is None:  # packed weights have no gradient
            _check_gradient(base, rows, layout)
    except ModelError:
        raise
    except Exception as error:  # an architecture may fail in any way on unknown arguments
        raise ModelError(f"{name}: cannot run packed rows ({reason(error)}); {WHICH}") from error

    # Decoding with a cache, and scoring behind a shared prefix.
    try:
        _check_decoding(base, rows, want.split(lengths))
    except ModelError:
        raise
    except Exception as error:  # such as keys and values of other shapes than the cache's
        problem = f"cannot decode with a cache ({reason(error)})"
        raise ModelError(f"{name}: {problem}; {WHICH}") from error


def check_kind(base: PreTrainedModel) -> None:
    """Refuse kinds of models that class and configuration show and a few tokens may not.

    No weight is read.

    Raises:
        ModelError: state from token to token, or attention to chosen positions or in chunks.
    """
    name = type(base).__name__
    if base._is_stateful:  # its first tokens' state is small, bf16's rounding may hide it
        problem = "carries state from token to token, and so from row to row"
        raise ModelError(f"{name}: {problem}; {WHICH}")
    config = base.config.get_text_config()
    longest = _longest(config)
    chunk = getattr(config, "attention_chunk_size", None) or longest
    if "chunked_attention" in (getattr(config, "layer_types", None) or ()) and chunk < longest:
        problem = f"attention_chunk_size={chunk}: fedsim knows no chunked attention"
        raise ModelError(f"{name}: {problem}; {WHICH}")
    chosen = getattr(config, "index_topk", None) or longest
    if chosen < longest:
        problem = f"index_topk={chosen}: fedsim knows no attention to chosen positions"
        raise ModelError(f"{name}: {problem}; {WHICH}")


def _longest(config: PretrainedConfig) -> int:
    """The longest context that a configuration allows, in tokens."""
    return int(getattr(config, "max_position_embeddings", None) or 1 << 30)


def _check_decoding(
    base: PreTrainedModel,
    rows: list[list[int]],
    want: Sequence[torch.Tensor],
) -> None:
    """Compare decoding with a cache, and scoring behind a shared prefix, with plain passes.

    Args:
        want: logits ``[length, vocabulary]`` of each row.
    """
    name = type(base).__name__
    places, found = _decoded(base, rows)
    wanted = torch.stack([want[row][place] for row, place in places])
    problem = f"{name}: its decoding with a cache differs from its plain forward pass"
    _compare(found, wanted, problem)

    # Logits [ends, candidates].
    candidates = sorted({i * wanted.shape[1] // NUM_CANDIDATES for i in range(NUM_CANDIDATES)})
    ends, found = _behind_head(base, rows[0], candidates)
    wanted = want[0][ends][:, candidates]
    _compare(
        found.to(wanted),
        wanted,
        f"{name}: its scoring behind a shared head differs from its plain forward pass",
    )


@torch.no_grad()
def _decoded(
    base: PreTrainedModel,
    rows: list[list[int]],
) -> tuple[list[tuple[int, int]], torch.Tensor]:
    """Decode the rows with the KV cache: prompts, a further turn, then single tokens.

    Returns:
        (row, place) of each token whose logits were computed, and the logits, ``[tokens,
        vocabulary]``.
    """
    num_rows, num_steps = len(rows), min(3, min(map(len, rows)) // 2)
    slots = Slots(num_rows, base.device)
    slots.reserve(max(map(len, rows)))
    places: list[tuple[int, int]] = []
    parts: list[torch.Tensor] = []

    # Two passes of several tokens each: the first half of every row, then all but its last
    # num_steps tokens.
    read = [len(row) - num_steps for row in rows]
    for ends in ([length - length // 2 for length in read], read):
        news = [row[begin:end] for row, begin, end in zip(rows, slots.lengths, ends, strict=True)]
        ids = _packed_ids(base, news)
        layout = Extending(slots, range(num_rows), [len(new) for new in news])
        last = layout.spans.query_starts[1:].long() - 1
        parts.append(packed_logits(base, ids, layout.spans.positions, layout, last))
        places += [(row, end - 1) for row, end in enumerate(ends)]
        slots.lengths = list(ends)

    # Steps of one token a row.
    index = torch.arange(num_rows, device=base.device)
    for _ in range(num_steps):
        where = torch.tensor(slots.lengths, device=base.device)
        new = [row[end] for row, end in zip(rows, slots.lengths, strict=True)]
        ids = torch.tensor(new, device=base.device)
        stepping = Stepping(slots, index, where, max(slots.lengths) + 1)
        parts.append(packed_logits(base, ids, where[None], stepping, index))
        places += list(enumerate(slots.lengths))
        slots.lengths = [length + 1 for length in slots.lengths]
    return places, torch.cat(parts)


def _behind_head(
    base: PreTrainedModel,
    row: list[int],
    candidates: list[int],
) -> tuple[list[int], torch.Tensor]:
    """Score two beginnings of a row behind their common prefix, as the guard scores its prompts.

    Returns:
        The place of each beginning's last token, and logits ``[2, candidates]``.
    """
    middle = len(row) // 2
    ends = [len(row), middle + 1]
    tails = [np.array(row[middle:end]) for end in ends]
    found = candidate_logits(base, read_head(base, np.array(row[:middle])), tails, candidates)
    return [end - 1 for end in ends], found


class _Noting(Rows):
    """Layout of packed rows that notes the window of each layer, in positions."""

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


def _packed_ids(base: PreTrainedModel, rows: list[list[int]]) -> torch.Tensor:
    """Token ids of all rows, one behind the other, int64 ``[tokens]``."""
    ids: list[int] = []
    for row in rows:
        ids += row
    return torch.tensor(ids, device=base.device)


@torch.no_grad()
def _packed(base: PreTrainedModel, rows: list[list[int]], layout: _Noting) -> torch.Tensor:
    """Logits ``[tokens, vocabulary]`` of all rows in one packed pass."""
    ids = _packed_ids(base, rows)
    return head_logits(base, packed_hidden(base, ids, layout.spans.positions, layout))


@torch.no_grad()
def _plain(base: PreTrainedModel, rows: list[list[int]]) -> torch.Tensor:
    """Logits ``[tokens, vocabulary]``, row by row, of transformers' eager attention and masks."""
    with _eager_attention(base):
        return torch.cat([_plain_row(base, row) for row in rows])


def _plain_row(base: PreTrainedModel, row: list[int]) -> torch.Tensor:
    """Logits ``[length, vocabulary]`` of one row by the model's own forward pass."""
    ids = torch.tensor([row], device=base.device)  # [1, length]
    logits: torch.Tensor = base(input_ids=ids, use_cache=False).logits[0]
    return logits


@contextlib.contextmanager
def _eager_attention(base: PreTrainedModel) -> Iterator[None]:
    """Use transformers' eager attention in place of fedsim's inside the block."""
    ours: Any = base.config._attn_implementation
    base.set_attn_implementation("eager")
    try:
        yield
    finally:
        base.set_attn_implementation(ours)


def _check_gradient(base: PreTrainedModel, rows: list[list[int]], layout: _Noting) -> None:
    """Compare the gradient of one weight, packed rows against row by row.

    The loss is the sum of −log p of all tokens but each row's first.
    """
    weight = _first_matrix(base)
    was_trained = weight.requires_grad
    weight.requires_grad_()
    try:
        with torch.enable_grad():
            # All rows at once, in training mode, as a step of training has them.
            ids = _packed_ids(base, rows)
            with _training(base):
                hidden = packed_hidden(base, ids, layout.spans.positions, layout)
                logits = head_logits(base, hidden)  # [tokens, vocabulary]
                parts = logits.split([len(row) for row in rows])
                losses = [_loss(part, row) for part, row in zip(parts, rows, strict=True)]
                (found,) = torch.autograd.grad(torch.stack(losses).sum(), weight)
            # Row by row, summed in fp32 or wider.
            with _eager_attention(base):
                wide = torch.promote_types(weight.dtype, torch.float32)
                wanted = torch.zeros_like(weight, dtype=wide)
                for row in rows:
                    wanted += torch.autograd.grad(_loss(_plain_row(base, row), row), weight)[0]
    finally:
        weight.requires_grad_(was_trained)

    # ‖found − wanted‖ / ‖wanted‖, in fp64.
    difference = (found.double() - wanted.double()).norm()
    distance = float(difference / wanted.double().norm().clamp_min(1e-12))
    limit = LIMITS.get(weight.dtype, 1e-3)
    if not distance <= limit:  # NaN too
        problem = "the gradient of packed rows differs from that of each row by itself"
        figures = f"a weight of the first layer: {distance:.2g} apart, {limit:g} is allowed"
        raise ModelError(f"{type(base).__name__}: {problem} ({figures}); {WHICH}")


def _first_matrix(base: PreTrainedModel) -> torch.nn.Parameter:
    """A matrix of the first layer, usually that of the queries."""
    num_layers = int(base.config.get_text_config().num_hidden_layers)
    decoder = text_decoder(base)
    first: torch.nn.Module = decoder
    for module in decoder.modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == num_layers:
            first = module[0]
            break
    return next(p for p in first.parameters() if p.dim() == 2 and p.is_floating_point())


def _loss(logits: torch.Tensor, row: list[int]) -> torch.Tensor:
    """Sum of −log p of each token after the first."""
    after = torch.tensor(row[1:], device=logits.device)
    wide = torch.promote_types(logits.dtype, torch.float32)
    return torch.nn.functional.cross_entropy(logits[:-1].to(wide), after, reduction="sum")


@contextlib.contextmanager
def _training(base: PreTrainedModel) -> Iterator[None]:
    """Use training mode inside the block; random generators are left as they were."""
    with torch.random.fork_rng([base.device] if base.device.type == "cuda" else []):
        base.train()
        try:
            yield
        finally:
            base.eval()


def _compare(found: torch.Tensor, wanted: torch.Tensor, problem: str) -> None:
    """Compare logits ``[tokens, vocabulary]`` by the largest relative distance of a token.

    Each token's mean is subtracted, since softmax does not depend on it.

    Raises:
        ModelError: they differ by more than :data:`LIMITS` allows; the message begins with
            ``problem``.
    """
    a = found.double() - found.double().mean(dim=-1, keepdim=True)
    b = wanted.double() - wanted.double().mean(dim=-1, keepdim=True)
    distance = float(((a - b).norm(dim=-1) / b.norm(dim=-1).clamp_min(1e-12)).max())
    limit = LIMITS.get(wanted.dtype, 1e-3)
    if not distance <= limit:  # NaN too
        figures = f"logits differ by {distance:.2g}, {limit:g} is allowed"
        raise ModelError(f"{problem} ({figures}); {WHICH}")


def _check_windows(base: PreTrainedModel, windows: dict[int, int | None]) -> None:
    """Check that each layer passes on its window, since fedsim lets the model build no mask.

    Args:
        base: the model.
        windows: layer → window that it gave to its attention, in positions; None without one.

    Raises:
        ModelError: a layer with a sliding window passed on another one, or none.
    """
    config = base.config.get_text_config()
    longest = _longest(config)
    types = getattr(config, "layer_types", None)
    sliding = getattr(config, "sliding_window", None) or 1 << 30
    for layer, window in windows.items():
        kind = types[layer] if types else "sliding_attention"
        if kind == "sliding_attention" and sliding < longest and window != sliding:
            problem = f"but its layer {layer} does not pass it on to its attention"
            name = type(base).__name__
            raise ModelError(f"{name}: sliding_window={sliding}, {problem}; {WHICH}")
