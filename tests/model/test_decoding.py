"""Every architecture is decoded as transformers decodes it, or refused with a sentence: tokens and logits of each step.

The models are those of fedsim.model.trial, small and random, of each family's own configuration.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from fedsim.attention.forward import IMPLEMENTATIONS
from fedsim.base.errors import ModelError
from fedsim.generate.decode import Decoder, Request
from fedsim.model.fitness import switch_dropout_off
from fedsim.model.trial import NUM_TOKENS, SIGHT, SIGHTS, shrunken, try_architecture

PINNED = re.search(r"^transformers==(.+)$", (Path(__file__).parents[2] / "constraints.txt").read_text(), re.M)


def config_of(name: str) -> Any:
    """A family's own configuration; skips one that is younger than an older transformers than the pinned one."""
    if name not in CONFIG_MAPPING and not is_pinned():
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    return AutoConfig.for_model(name)


def is_pinned() -> bool:
    """Tell whether transformers is the version that the lists below are of."""
    assert PINNED is not None
    return transformers.__version__ == PINNED.group(1)


ACCEPTED = [
    "afmoe",
    "apertus",
    "arcee",
    "aria_text",
    "axk1",
    "biogpt",
    "bitnet",
    "cohere",
    "cohere2",
    "cohere2_moe",
    "ctrl",
    "cwm",
    "deepseek_v3",
    "diffllama",
    "emu3",
    "ernie4_5",
    "ernie4_5_moe",
    "exaone4",
    "exaone_moe",
    "flex_olmo",
    "fuyu",
    "gemma",
    "gemma2",
    "gemma3",
    "gemma3_text",
    "gemma4",
    "gemma4_text",
    "gemma4_unified",
    "gemma4_unified_text",
    "glm",
    "glm4",
    "glm4_moe",
    "glm4_moe_lite",
    "got_ocr2",
    "gpt-sw3",
    "gpt2",
    "gpt_bigcode",
    "gpt_neox",
    "granite",
    "granitemoe",
    "granitemoeshared",
    "helium",
    "hy_v3",
    "hyperclovax",
    "internlm3",
    "iquestcoder",
    "jais2",
    "jetmoe",
    "kolibri1",
    "laguna",
    "llama",
    "longcat_flash",
    "mellum",
    "minicpm3",
    "minimax_m2",
    "ministral3",
    "mistral",
    "mixtral",
    "moss_transcribe_diarize",
    "nanochat",
    "olmo",
    "olmo2",
    "olmo3",
    "olmoe",
    "opt",
    "persimmon",
    "phi",
    "phi3",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_moe",
    "seed_oss",
    "smollm3",
    "solar_open",
    "starcoder2",
    "vaultgemma",
    "youtu",
]

COMMON = {
    "deepseek_v3",
    "gemma2",
    "gemma3_text",
    "glm4",
    "gpt2",
    "granite",
    "llama",
    "mistral",
    "mixtral",
    "olmo2",
    "phi3",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "smollm3",
}
"""Families that every run of the tests decodes; the others are tried in depth."""
ALL = [pytest.param(name, marks=() if name in COMMON else pytest.mark.deep) for name in ACCEPTED]

REFUSED = {
    "axk2": "index_topk",
    "bailing_hybrid": "carries state from token to token",
    "deepseek_v32": "index_topk=2048: fedsim knows no attention to chosen positions",
    "glm_moe_dsa": "index_topk=2048: fedsim knows no attention to chosen positions",
    "doge": "chooses by a mask of its own what a token sees",
    "falcon_h1": "carries state from token to token",
    "jamba": "carries state from token to token",
    "lfm3": "only 2 of its 4 layers use transformers' attention interface",
    "minimax": "only 1 of its 2 layers use transformers' attention interface",
    "stablelm": "only 0 of its 2 layers use transformers' attention interface",
    "gpt_oss": "has attention sinks",
    "beam": "cannot decode with a cache",
    "mimo_v2_flash": "has attention sinks",
    "bert": "packed rows differ from each row by itself",
    "bloom": "cannot run packed rows",
}

UNTRIED = ("bart", "codegen", "deepseek_v4", "modernbert-decoder", "whisper")
"""Of these no small model can be made: a run loads them once before its first stage."""

NUM_STEPS = 10
PROMPTS = [[5, 7, 9, 11, 20, 31, 44, 7, 8], [50, 60, 34], [13]]


class Recording(Decoder):
    """Keeps the logits that each token is drawn from, by row."""

    logits: dict[int, list[torch.Tensor]]

    def _draw(self, begin: int, end: int, logits: torch.Tensor) -> None:
        for slot, line in zip(range(begin, end), logits, strict=True):
            self.logits.setdefault(self._rows[slot].index, []).append(line.clone())
        super()._draw(begin, end, logits)


def small_model(name: str) -> PreTrainedModel:
    """A random model with windows shorter than the rows."""
    config = config_of(name)
    switch_dropout_off(config)
    small = shrunken(config)
    for key in SIGHTS:
        if isinstance(getattr(small.get_text_config(), key, None), int):
            setattr(small.get_text_config(), key, SIGHT)
    capped = getattr(small.get_text_config(), "attn_logit_softcapping", None) is not None
    small._attn_implementation = IMPLEMENTATIONS["eager" if capped else "sdpa"]
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(small, dtype=torch.float32).eval()
    assert isinstance(model, PreTrainedModel)
    return model


@pytest.mark.parametrize("name", ALL)
def test_an_accepted_family_is_decoded_as_transformers_decodes(name: str) -> None:
    config = config_of(name)
    switch_dropout_off(config)
    before = torch.get_rng_state()
    is_tried = try_architecture(config, "sdpa")
    if not is_tried and not is_pinned():
        pytest.skip(f"of {name} transformers {transformers.__version__} makes no small model: runs load it first")
    assert is_tried
    assert torch.equal(torch.get_rng_state(), before), "no number is drawn"
    model = small_model(name)
    decoder = Recording(model, 2, max_new_tokens=NUM_STEPS, eos_ids=frozenset())
    decoder.logits = {}
    replies = decoder.run([Request(prompt, 0, NUM_STEPS, 0.0) for prompt in PROMPTS])
    model.set_attn_implementation("eager")
    for row, (prompt, (turn,)) in enumerate(zip(PROMPTS, replies, strict=True)):
        tokens, logits = greedy(model, prompt)
        assert turn.ids == tokens
        torch.testing.assert_close(torch.stack(decoder.logits[row]), logits, atol=1e-4, rtol=1e-3)
        assert logits.std() > 1e-3


@torch.no_grad()
def greedy(model: Any, prompt: list[int]) -> tuple[list[int], torch.Tensor]:
    """What transformers' own eager attention, masks and cache give."""
    model.generation_config.eos_token_id = None
    model.generation_config.suppress_tokens = None
    ids = torch.tensor([prompt])
    made = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NUM_STEPS, pad_token_id=0,
        return_dict_in_generate=True, output_logits=True, eos_token_id=None,
    )  # fmt: skip
    return made.sequences[0, len(prompt) :].tolist(), torch.cat(made.logits)


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_family_has_its_sentence(name: str) -> None:
    config = config_of(name)
    switch_dropout_off(config)
    with pytest.raises(ModelError) as caught:
        try_architecture(config, "sdpa")
    assert REFUSED[name] in str(caught.value) and "\n" not in str(caught.value)
    assert "use a" in str(caught.value) or "fedsim needs a decoder" in str(caught.value)
    assert "fedsim_" not in str(caught.value)


@pytest.mark.parametrize("name", UNTRIED)
def test_what_cannot_be_tried_is_said_to_be_untried(name: str) -> None:
    config: PretrainedConfig = config_of(name)
    assert try_architecture(config, "sdpa") is False


def test_a_small_model_keeps_what_its_layers_depend_on() -> None:
    config: Any = AutoConfig.for_model(
        "gemma3_text", num_hidden_layers=12, num_attention_heads=16, num_key_value_heads=4, head_dim=24,
        query_pre_attn_scalar=20,
    )  # fmt: skip
    small: Any = shrunken(config)
    assert (small.head_dim, small.query_pre_attn_scalar) == (24, 20)
    assert small.num_attention_heads // small.num_key_value_heads == 4
    assert set(small.layer_types) == set(config.layer_types) and small.num_hidden_layers == len(small.layer_types) == 3
    assert small.vocab_size == NUM_TOKENS and config.num_hidden_layers == 12
