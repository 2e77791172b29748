"""Decoding of one unit of prompts: a static batch with a KV cache, each row drawing from its own key.

The numbers of row i come from its seed alone, and a unit's rows never change with the number of ranks, so the tokens do
not either. Rows that have ended leave the batch once half of it is done.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from transformers import PreTrainedModel

from fedsim.attention.forward import packed_logits
from fedsim.generate.slots import Extending, Slots, Stepping


@torch.inference_mode()
def decode_unit(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    *,
    temperature: float,
    max_new_tokens: int,
    eos_ids: frozenset[int],
) -> list[tuple[list[int], bool]]:
    """Continue every prompt.

    Args:
        model: a Hugging Face causal LM in eval mode.
        prompts: token ids, each with at least one.
        seeds: one per prompt; draws of token t use the t-th uniform number of its stream.
        temperature: 0 takes the most likely token (the smallest id of equals).
        max_new_tokens: most tokens to generate per row.
        eos_ids: a row ends with the first of these.

    Returns:
        Per prompt the new ids (the end token included) and whether it ended by itself.
    """
    device = next(model.parameters()).device
    rows = list(range(len(prompts)))  # which prompt each row of the batch is
    streams = [np.random.Generator(np.random.Philox(key=s)) for s in seeds]
    out: list[list[int]] = [[] for _ in prompts]
    ended = [False] * len(prompts)
    slots = Slots(len(prompts), device)
    first = Extending(slots, [len(p) for p in prompts])
    ids = torch.tensor([i for p in prompts for i in p], device=device)
    logits = packed_logits(model, ids, first.spans.positions, first, first.spans.query_starts[1:].long() - 1)
    slots.lengths = [len(p) for p in prompts]
    for step in range(max_new_tokens):
        tokens = pick(logits, [0.0 if temperature == 0 else streams[r].random() for r in rows], temperature)
        alive = []
        for i, (row, token) in enumerate(zip(rows, tokens.tolist(), strict=True)):
            if not ended[row]:
                out[row].append(token)
                ended[row] = token in eos_ids
            if not ended[row]:
                alive.append(i)
        if not alive or step + 1 == max_new_tokens:
            break
        if 2 * len(alive) <= len(rows):
            slots.keep(alive)
            tokens = tokens[torch.tensor(alive, device=device)]
            rows = [rows[i] for i in alive]
        layout = Stepping(slots)
        logits = packed_logits(model, tokens, layout.positions, layout, torch.arange(len(rows), device=device))
        slots.lengths = [length + 1 for length in slots.lengths]
    return list(zip(out, ended, strict=True))


def pick(logits: torch.Tensor, uniforms: Sequence[float], temperature: float) -> torch.Tensor:
    """One token per row: inverse of the cumulative distribution at the row's uniform number.

    Args:
        logits: ``[rows, vocabulary]``.
        uniforms: in [0, 1), one per row; unused at temperature 0.
        temperature: 0 takes the argmax.

    Returns:
        int64 ``[rows]``.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    cumulative = (logits.double() / temperature).softmax(dim=-1).cumsum(dim=-1)
    level = torch.tensor(uniforms, dtype=torch.float64, device=logits.device)[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, level, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)
