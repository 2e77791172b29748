"""The one forward pass of the product: packed rows through a Hugging Face causal LM, attention by a layout.

Transformers' attention modules call the function that is registered under the model's ``attn_implementation``; ours
hands queries, keys and values to the layout that came with the call. Linear layers see no padding, masks are never
built by the model, and no cache class of the library is in play.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, NamedTuple, Protocol

import torch
from peft import PeftModel
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from fedsim.attention.backends import BACKENDS, Backend, Scores
from fedsim.attention.spans import Spans
from fedsim.base.errors import ModelError

IMPLEMENTATIONS: Final = {
    "sdpa": "fedsim_fused",  # transformers treats names with "sdpa" and "flash" in its own way
    "eager": "fedsim_plain",
    "varlen": "fedsim_varlen",
    "flash_attention_2": "fedsim_fa2",
}
"""Name of each backend among transformers' attention implementations."""

_READY_MASK: Final = torch.ones(1, 1, 1, 1, dtype=torch.bool)
"""A mask of four dimensions is passed on as it is: the model builds none, and does not look at the positions for it."""


class Place(NamedTuple):
    """One attention of a pass: which of its layer's, as some layers have two over one set of keys (DiffLlama)."""

    layer: int
    call: int = 0


class Layout(Protocol):
    """What the queries of a packed batch attend to."""

    def attend(
        self,
        backend: Backend,
        place: Place,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scores: Scores,
    ) -> torch.Tensor:
        """Attention at one place.

        Args:
            place: of the attention in the pass; keys and values that are kept are kept by it.
            query: ``[queries, query heads, head size]``.
            key: ``[tokens, key heads, head size]``, of the batch's tokens (which are the queries, but for
                :class:`Narrowed` layers).
            value: ``[tokens, key heads, value size]``; of latent attention (DeepSeek) another size than the keys'.

        Returns:
            ``[queries, query heads, value size]``.
        """
        ...


class Rotation(Protocol):
    """Rotary positions that a fused attention leaves to the layout (:class:`fedsim.fused.choice.Rotation`)."""

    def rotated(self, query: torch.Tensor, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries and keys, ``[batch, heads, length, head size]``, rotated."""
        ...

    def rotated_into(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        places: torch.Tensor,
    ) -> torch.Tensor:
        """Rotated queries ``[rows, query heads, head size]``; row i's key and value go to slot i of a cache.

        Args:
            query: ``[rows, query heads, head size]``; ``key`` and ``value`` with the key heads.
            keys: ``[slots, capacity, key heads, head size]``; ``values`` likewise.
            places: int64 ``[rows]``: the position that each row writes.
        """
        ...


class Rows:
    """Each row attends to itself alone: training and scoring."""

    def __init__(self, spans: Spans) -> None:
        assert spans.is_plain
        self.spans = spans

    def attend(
        self,
        backend: Backend,
        place: Place,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scores: Scores,
    ) -> torch.Tensor:
        """See :class:`Layout`."""
        return backend.spans(query, key, value, self.spans, scores)


@dataclass(frozen=True, eq=False)
class Narrowed:
    """What the last layer computes: its keys and values of all tokens, the rest of the kept ones alone.

    Attributes:
        keep: int64 ``[kept]``: indices of tokens.
        layout: the last layer's; its queries are the kept tokens, its keys those of all tokens.
    """

    keep: torch.Tensor
    layout: Layout


class _Pass:
    """One forward pass.

    Attributes:
        layout: of the layers that are still to come.
        calls: attentions so far, by layer.
        read: keys and values of all tokens that the narrowed layer has read alone.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.calls: dict[int, int] = {}
        self.is_reading = self.is_narrow = False
        self.read: tuple[torch.Tensor, torch.Tensor] | None = None


class _HaveKeys(Exception):
    """A layer has projected its keys and values."""


def causal_lm(model: nn.Module) -> PreTrainedModel:
    """The Hugging Face model inside a PEFT wrapper (its layers keep their adapters)."""
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    assert isinstance(inner, PreTrainedModel)
    return inner


def text_decoder(causal: PreTrainedModel) -> nn.Module:
    """The layers that read text; of a multimodal model without the towers that read images and sound."""
    decoder: nn.Module = causal.get_decoder()
    return decoder


def text_names(causal: PreTrainedModel) -> str:
    """A pattern of the names of all modules that text goes through: the decoder, the head, and what lies below them."""
    parts = [text_decoder(causal), causal.get_output_embeddings()]
    if causal in parts:
        return ".*"
    roots = [re.escape(name) for name, module in causal.named_modules() if any(module is part for part in parts)]
    return rf"(?:{'|'.join(roots)})(?:\..*)?"


def packed_logits(
    model: nn.Module, ids: torch.Tensor, positions: torch.Tensor, layout: Layout, keep: torch.Tensor | None
) -> torch.Tensor:
    """Logits at chosen tokens of a packed batch; the head sees no other token.

    Args:
        model: a causal LM from :mod:`fedsim.model.load`, PEFT-wrapped or not; its own soft-capping and scaling of
            logits apply.
        ids: int64 ``[tokens]``, on the model's device.
        positions: int64 ``[1, tokens]``.
        keep: int64 ``[kept]``: indices of tokens; None: all.

    Returns:
        ``[kept, vocabulary]`` in the model's dtype.

    Raises:
        ModelError: an architecture whose layers do not all go through transformers' attention interface.
    """
    causal = causal_lm(model)
    passing = _Pass(layout)
    out = causal(
        input_ids=ids[None],
        attention_mask=_READY_MASK,
        position_ids=positions,
        use_cache=False,
        logits_to_keep=0 if keep is None else keep,
        packed_pass=passing,
    )
    _check_layers(causal, passing)
    logits: torch.Tensor = out.logits.squeeze(0)  # indexing would copy in the backward pass
    return logits


def packed_hidden(
    model: nn.Module,
    ids: torch.Tensor,
    positions: torch.Tensor,
    layout: Layout,
    narrowed: Narrowed | None = None,
) -> torch.Tensor:
    """Last hidden states of a packed batch.

    Args:
        narrowed: where only some tokens' hidden states are wanted, the last layer need not compute the others; without
            gradient.

    Returns:
        ``[tokens, width]``, or ``[kept, width]``. Other arguments and errors as of :func:`packed_logits`.
    """
    causal = causal_lm(model)
    passing = _Pass(layout)
    with _narrowing(causal, passing, narrowed, len(ids)):
        out = causal.base_model(
            input_ids=ids[None],
            attention_mask=_READY_MASK,
            position_ids=positions,
            use_cache=False,
            packed_pass=passing,
        )
    _check_layers(causal, passing)
    hidden: torch.Tensor = out.last_hidden_state.squeeze(0)
    return hidden if narrowed is None else hidden[narrowed.keep]


@contextmanager
def _narrowing(causal: PreTrainedModel, passing: _Pass, narrowed: Narrowed | None, num_tokens: int) -> Iterator[None]:
    """Let the last layer run twice: up to its keys and values with all tokens, then whole with the kept ones.

    A layer whose states have another shape than ``[1, tokens, width]`` runs as it is, with all tokens; so does the last
    layer where others have more than one attention, as it would have to run up to the last of its own.
    """
    if narrowed is None:
        yield
        return
    assert not torch.is_grad_enabled(), "a narrowed layer passes no gradient on"
    num_layers = int(causal.config.get_text_config().num_hidden_layers)
    stacks = [m for m in text_decoder(causal).modules() if isinstance(m, nn.ModuleList) and len(m) == num_layers]
    assert stacks, "a decoder is a list of layers"

    def fits(args: tuple[Any, ...]) -> bool:
        has_one_attention = max(passing.calls.values(), default=1) == 1
        return has_one_attention and bool(args) and args[0].dim() == 3 and args[0].shape[1] == num_tokens

    def narrow(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        if not fits(args):
            return None
        passing.is_reading = True
        try:
            layer.forward(*args, **kwargs)
        except _HaveKeys:
            passing.layout = narrowed.layout
        finally:
            passing.is_reading = False
        passing.is_narrow = True
        return _kept(args, num_tokens, narrowed.keep), _kept(kwargs, num_tokens, narrowed.keep)

    def widen(_: nn.Module, args: tuple[Any, ...], out: Any) -> Any:
        """The model sees as many tokens as it was given; those that were left out are zero."""
        if not passing.is_narrow:
            return None
        if isinstance(out, tuple):
            return (widen(_, args, out[0]), *out[1:])
        return out.new_zeros(1, num_tokens, out.shape[-1]).index_copy_(1, narrowed.keep, out)

    last = stacks[0][-1]
    hooks = [last.register_forward_pre_hook(narrow, with_kwargs=True), last.register_forward_hook(widen)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


_NOT_OF_TOKENS: Final = ("attention_mask", "past_key_values", "shared_kv_states")
"""A layer's arguments whose second dimension, heads say, may be as long as the tokens are many, and means another."""


def _kept(part: Any, num_tokens: int, keep: torch.Tensor) -> Any:
    """A layer's arguments with the kept tokens alone: whatever is ``[1, tokens, …]``, such as rotary embeddings."""
    if isinstance(part, torch.Tensor):
        return part.index_select(1, keep) if part.dim() > 1 and part.shape[:2] == (1, num_tokens) else part
    if isinstance(part, tuple):
        return tuple(_kept(item, num_tokens, keep) for item in part)
    if isinstance(part, dict):
        return {name: item if name in _NOT_OF_TOKENS else _kept(item, num_tokens, keep) for name, item in part.items()}
    return part


def _check_layers(causal: PreTrainedModel, passing: _Pass) -> None:
    """A layer that mixes tokens in another way would mix rows."""
    num_layers = int(causal.config.get_text_config().num_hidden_layers)
    if len(passing.calls) != num_layers:
        raise unsupported(type(causal).__name__, f"only {len(passing.calls)} of its {num_layers} layers use")


def unsupported(architecture: str, who: str) -> ModelError:
    """The error of layers that compute attention by themselves; ``who`` says which do otherwise."""
    return ModelError(
        f"{architecture}: {who} transformers' attention interface; fedsim needs a decoder whose layers all do, such as "
        "Llama, Qwen, Mistral or Gemma"
    )


def _attention(
    backend: Backend,
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    packed_pass: _Pass | None = None,
    rotation: Rotation | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Compute attention for transformers: ``[batch, heads, length, size]`` in, ``[batch, length, heads, size]`` out.

    Without a layout each batch entry is a row of its own, whose queries are the last of its positions. With a rotation
    queries and keys are not rotated yet: a layout that has ``attend_rotating`` does it, others get them rotated.
    """
    assert not dropout, "dropout of the model's own is switched off when it is loaded"
    if s_aux is not None:
        raise ModelError(
            f"{type(module).__name__}: has attention sinks, which fedsim does not compute; use another model"
        )
    if packed_pass is not None and attention_mask is not None and attention_mask.numel() > 1:
        raise ModelError(
            f"{type(module).__name__}: chooses by a mask of its own what a token sees, which fedsim does not compute; "
            "use another model"
        )
    scores = Scores(query.shape[-1] ** -0.5 if scaling is None else scaling, sliding_window, softcap)
    batch, _heads, length, _size = query.shape
    attend_rotating = None if packed_pass is None else getattr(packed_pass.layout, "attend_rotating", None)
    if rotation is not None and attend_rotating is None:
        query, key = rotation.rotated(query, key)
    queries, keys, values = (part.transpose(1, 2).flatten(0, 1) for part in (query, key, value))
    if packed_pass is None:
        spans = Spans([length] * batch, [key.shape[2]] * batch, device=query.device)
        out = backend.spans(queries, keys, values, spans, scores)
    else:
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        if packed_pass.is_reading:
            packed_pass.read = keys, values
            raise _HaveKeys
        if packed_pass.read is not None:
            keys, values = packed_pass.read
        call = packed_pass.calls.get(layer, 0)
        packed_pass.calls[layer] = call + 1
        place = Place(layer, call)
        if rotation is not None and attend_rotating is not None:
            out = attend_rotating(backend, place, queries, keys, values, scores, rotation)
        else:
            out = packed_pass.layout.attend(backend, place, queries, keys, values, scores)
    return out.view(batch, length, *out.shape[1:]), None


def _no_mask(*_: Any, attention_mask: torch.Tensor | None = None, **__: Any) -> None:
    """Layouts say who sees whom; of a plain call, a mask that leaves something out would be lost."""
    assert attention_mask is None or bool(attention_mask.all()), "padded batches need a layout, not an attention mask"


for _name, _implementation in IMPLEMENTATIONS.items():
    AttentionInterface.register(_implementation, partial(_attention, BACKENDS[_name]))
    AttentionMaskInterface.register(_implementation, _no_mask)
