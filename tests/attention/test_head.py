"""The head alone equals the whole forward pass, for the vocabulary and for candidates; other heads are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers.modeling_outputs import CausalLMOutputWithPast

from fedsim.attention.head import head_logits
from fedsim.base.errors import ModelError


@pytest.mark.parametrize("targets", [None, ["q_proj", "lm_head"]])
@torch.no_grad()
def test_the_head_alone_equals_the_whole_forward(make_llama: Callable[..., Any], targets: list[str] | None) -> None:
    model = make_llama()
    if targets:
        model = get_peft_model(model, LoraConfig(r=3, target_modules=targets, init_lora_weights=False)).eval()
    model = model.double()
    causal = model.get_base_model() if targets else model
    ids = torch.arange(3, 9)[None]
    hidden = causal.model(input_ids=ids, use_cache=False).last_hidden_state[0]
    want = model(input_ids=ids, use_cache=False).logits[0]
    assert torch.equal(head_logits(model, hidden), want) and want.std() > 0.1
    torch.testing.assert_close(head_logits(model, hidden, [7, 90, 3]), want[:, [7, 90, 3]], atol=1e-12, rtol=0)
    assert not any("forward" in vars(module) for module in causal.modules())


@torch.no_grad()
def test_a_head_that_is_not_behind_the_body_is_refused(
    make_llama: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its logits would be another body's."""
    model: Any = make_llama()
    monkeypatch.setattr(model, "forward", lambda **_: CausalLMOutputWithPast(logits=torch.zeros(1, 3, 261)))
    with pytest.raises(ModelError, match="LlamaForCausalLM: does not make its logits from its body's output"):
        head_logits(model, torch.zeros(3, 32))
    assert "forward" not in vars(model.model)
