"""The one forward pass of fedsim: packed rows through a Hugging Face causal LM.

Transformers' attention modules call the function that is registered under the model's
``attn_implementation``; fedsim's hands queries, keys and values to the layout that came with the
call. Linear layers see no padding, the model never builds a mask, and no cache class of the library
is used.
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
"""Mask that keeps the model from building one: four dimensions are passed on as they are."""


class Place(NamedTuple):
    """Place of an attention in a pass: layer, and number in it (DiffLlama has two a layer)."""

    layer: int
    call: int = 0


class Layout(Protocol):
    """Assignment of the positions that the queries of a packed batch attend to."""

    def attend(
        self,
        backend: Backend,
        place: Place,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scores: Scores,
    ) -> torch.Tensor:
        """Compute attention at one place.

        Args:
            backend: computes it.
            place: of the attention in the pass; key of the keys and values that are kept.
            query: ``[queries, query heads, head size]``.
            key: ``[tokens, key heads, head size]``, of the batch's tokens (which are the queries,
                but for :class:`Narrowed` layers).
            value: ``[tokens, key heads, value size]``; of latent attention (DeepSeek) another size
                than the keys'.

        Returns:
            ``[queries, query heads, value size]``.
        """
        ...


class Rotation(Protocol):
    """Rotary positions that a fused attention leaves to the layout.

    :class:`fedsim.fused.choice.Rotation` implements it.
    """

    def rotated(self, query: torch.Tensor, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotate queries and keys, ``[batch, heads, length, head size]``."""
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
        """Rotate queries and keys, and write row i's key and value to slot i of a cache.

        Args:
            query: ``[rows, query heads, head size]``; ``key`` and ``value`` with the key heads.
            keys: ``[slots, capacity, key heads, head size]``; ``values`` likewise.
            places: int64 ``[rows]``: the position that each row writes.

        Returns:
            The rotated queries, ``[rows, query heads, head size]``.
        """
        ...


class Rows:
    """Layout in which each row attends only to itself: training and scoring."""

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
    """Restriction of the last layer: keys and values of all tokens, the rest only of kept tokens.

    Attributes:
        keep: int64 ``[kept]``: indices of tokens.
        layout: the last layer's; its queries are the kept tokens, its keys those of all tokens.
    """

    keep: torch.Tensor
    layout: Layout


class _Pass:
    """State of one forward pass.

    Attributes:
        layout: of the layers that are still to come.
        calls: number of attentions so far, by layer.
        is_reading: the last layer computes only its keys and values.
        is_narrow: the last layer computes only the kept tokens.
        read: keys and values of all tokens that the narrowed layer has computed.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.calls: dict[int, int] = {}
        self.is_reading = False
        self.is_narrow = False
        self.read: tuple[torch.Tensor, torch.Tensor] | None = None


class _HaveKeys(Exception):
    """Raised inside a layer once it has projected its keys and values."""


def causal_lm(model: nn.Module) -> PreTrainedModel:
    """The Hugging Face model inside a PEFT wrapper (its layers keep their adapters)."""
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    assert isinstance(inner, PreTrainedModel)
    return inner


def text_decoder(causal: PreTrainedModel) -> nn.Module:
    """The layers that read text, without a multimodal model's towers for images and sound."""
    decoder: nn.Module = causal.get_decoder()
    return decoder


def text_names(causal: PreTrainedModel) -> str:
    """Regular expression of the names of all modules that text goes through.

    These are the decoder, the LM head, and the modules below them.
    """
    parts = [text_decoder(causal), causal.get_output_embeddings()]
    if causal in parts:
        return ".*"
    roots = []
    for name, module in causal.named_modules():
        if any(module is part for part in parts):
            roots.append(re.escape(name))
    return rf"(?:{'|'.join(roots)})(?:\..*)?"


def packed_logits(
    model: nn.Module,
    ids: torch.Tensor,
    positions: torch.Tensor,
    layout: Layout,
    keep: torch.Tensor | None,
) -> torch.Tensor:
    """Compute logits at chosen tokens of a packed batch; the LM head sees no other token.

    Args:
        model: a causal LM from :mod:`fedsim.model.load`, PEFT-wrapped or not; its own soft-capping
            and scaling of logits apply.
        ids: int64 ``[tokens]``, on the model's device.
        positions: int64 ``[1, tokens]``.
        layout: assigns the positions to which the tokens attend.
        keep: int64 ``[kept]``: indices of tokens; None: all.

    Returns:
        ``[kept, vocabulary]`` in the model's dtype.

    Raises:
        ModelError: an architecture whose layers do not all go through transformers' attention
            interface.
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
    """Compute the last hidden states of a packed batch.

    Args:
        narrowed: kept tokens, the only ones that the last layer computes; without gradient. None:
            all tokens.

    Returns:
        ``[tokens, width]``, or ``[kept, width]``. Other arguments and errors as of
        :func:`packed_logits`.
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
def _narrowing(
    causal: PreTrainedModel,
    passing: _Pass,
    narrowed: Narrowed | None,
    num_tokens: int,
) -> Iterator[None]:
    """Run the last layer for kept tokens only, in two passes: K/V of all tokens, rest of the kept.

    A layer whose states have another shape than ``[1, tokens, width]`` runs as it is, with all
    tokens; so does the last layer if others have more than one attention, as it would have to run
    up to its last one.
    """
    if narrowed is None:
        yield
        return
    assert not torch.is_grad_enabled(), "a narrowed layer passes no gradient on"
    last = _last_layer(causal)

    def fits(args: tuple[Any, ...]) -> bool:
        if max(passing.calls.values(), default=1) != 1 or not args:
            return False
        states = args[0]  # [1, tokens, width]
        return states.dim() == 3 and states.shape[1] == num_tokens

    # Before the layer: a first pass, which ends at its attention; then the kept tokens' arguments.
    def narrow(
        layer: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple[Any, Any] | None:
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

    # After the layer: as many tokens as the model was given; those that were left out are zero.
    def widen(_: nn.Module, args: tuple[Any, ...], out: Any) -> Any:
        if not passing.is_narrow:
            return None
        if isinstance(out, tuple):
            return (widen(_, args, out[0]), *out[1:])
        return out.new_zeros(1, num_tokens, out.shape[-1]).index_copy_(1, narrowed.keep, out)

    hooks = [
        last.register_forward_pre_hook(narrow, with_kwargs=True),
        last.register_forward_hook(widen),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _last_layer(causal: PreTrainedModel) -> nn.Module:
    """The last layer of the decoder: of its first module list with as many layers as configured."""
    num_layers = int(causal.config.get_text_config().num_hidden_layers)
    for module in text_decoder(causal).modules():
        if isinstance(module, nn.ModuleList) and len(module) == num_layers:
            return module[-1]
    raise AssertionError("a decoder is a list of layers")


_NOT_OF_TOKENS: Final = ("attention_mask", "past_key_values", "shared_kv_states")
"""Arguments of a layer whose second dimension is not tokens, though it may be as long."""


def _kept(part: Any, num_tokens: int, keep: torch.Tensor) -> Any:
    """Restrict a layer's arguments of shape ``[1, tokens, …]`` to the kept tokens.

    Such are hidden states and rotary embeddings, also inside tuples and dictionaries.
    """
    if isinstance(part, torch.Tensor) and part.dim() > 1 and part.shape[:2] == (1, num_tokens):
        return part.index_select(1, keep)
    if isinstance(part, tuple):
        return tuple(_kept(item, num_tokens, keep) for item in part)
    if isinstance(part, dict):
        kept = dict(part)
        for name, item in part.items():
            if name not in _NOT_OF_TOKENS:
                kept[name] = _kept(item, num_tokens, keep)
        return kept
    return part


def _check_layers(causal: PreTrainedModel, passing: _Pass) -> None:
    """Check that all layers used fedsim's attention: one that did not would mix rows."""
    num_layers = int(causal.config.get_text_config().num_hidden_layers)
    num_used = len(passing.calls)
    if num_used != num_layers:
        raise unsupported(type(causal).__name__, f"only {num_used} of its {num_layers} layers use")


def unsupported(architecture: str, who: str) -> ModelError:
    """Error for layers that compute attention by themselves.

    Args:
        architecture: class name of the model.
        who: subject and verb, such as "its layers do not use".
    """
    fix = "fedsim needs a decoder whose layers all do, such as Llama, Qwen, Mistral or Gemma"
    return ModelError(f"{architecture}: {who} transformers' attention interface; {fix}")


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
    """Compute attention for transformers.

    Without a layout each batch entry is a row of its own, whose queries are the last of its
    positions. With a rotation queries and keys are not rotated yet: a layout that has
    ``attend_rotating`` does it, others get them rotated.

    Args:
        query: ``[batch, query heads, length, size]``; keys and values with their heads and sizes.

    Returns:
        ``[batch, length, query heads, value size]``, and None for the weights.

    Raises:
        ModelError: the layer has attention sinks, or a mask of its own.
    """
    assert not dropout, "dropout of the model's own is switched off when it is loaded"
    if s_aux is not None:
        problem = "has attention sinks, which fedsim does not compute"
        raise ModelError(f"{type(module).__name__}: {problem}; use another model")
    if packed_pass is not None and attention_mask is not None and attention_mask.numel() > 1:
        problem = "chooses by a mask of its own what a token sees, which fedsim does not compute"
        raise ModelError(f"{type(module).__name__}: {problem}; use another model")
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    scores = Scores(scaling, sliding_window, softcap)
    batch, _heads, length, _size = query.shape

    # Rotate here, unless the layout does it; then to [tokens, heads, size].
    attend_rotating = None
    if packed_pass is not None:
        attend_rotating = getattr(packed_pass.layout, "attend_rotating", None)
    if rotation is not None and attend_rotating is None:
        query, key = rotation.rotated(query, key)
    queries, keys, values = (part.transpose(1, 2).flatten(0, 1) for part in (query, key, value))

    # A plain call: rows of equal length.
    if packed_pass is None:
        spans = Spans([length] * batch, [key.shape[2]] * batch, device=query.device)
        out = backend.spans(queries, keys, values, spans, scores)
        return out.view(batch, length, *out.shape[1:]), None

    # A narrowed layer: its first pass ends here, its second one takes the keys of all tokens.
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    if packed_pass.is_reading:
        packed_pass.read = keys, values
        raise _HaveKeys
    if packed_pass.read is not None:
        keys, values = packed_pass.read

    # Attention by the layout.
    call = packed_pass.calls.get(layer, 0)
    packed_pass.calls[layer] = call + 1
    place = Place(layer, call)
    if rotation is not None and attend_rotating is not None:
        out = attend_rotating(backend, place, queries, keys, values, scores, rotation)
    else:
        out = packed_pass.layout.attend(backend, place, queries, keys, values, scores)
    return out.view(batch, length, *out.shape[1:]), None


def _no_mask(*_: Any, attention_mask: torch.Tensor | None = None, **__: Any) -> None:
    """Build no mask: the layout decides; a plain call's mask, which would be lost, is refused."""
    is_lossless = attention_mask is None or bool(attention_mask.all())
    assert is_lossless, "padded batches need a layout, not an attention mask"


for _name, _implementation in IMPLEMENTATIONS.items():
    AttentionInterface.register(_implementation, partial(_attention, BACKENDS[_name]))
    AttentionMaskInterface.register(_implementation, _no_mask)
