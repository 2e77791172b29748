"""Decoding: greedy equals Hugging Face's, samples follow the softmax, a row draws from its own seed alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM, PreTrainedModel

from fedsim.attention.forward import IMPLEMENTATIONS, Place
from fedsim.attention.kv_cache import Slots
from fedsim.base.errors import RunError
from fedsim.generate import decode
from fedsim.generate.decode import Decoder, Request
from fedsim.generate.sampling import pick
from fedsim.kernels.sampling import BLOCK

EOS, PAD = 259, 260


def prompts(lengths: list[int], seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 250, n).tolist() for n in lengths]


def run(model: PreTrainedModel, asked: list[list[int]], **changes: Any) -> list[tuple[list[int], bool]]:
    options: dict[str, Any] = {
        "seeds": list(range(len(asked))), "temperature": 0.0, "max_new_tokens": 12, "eos_ids": frozenset({EOS}),
        **changes,
    }  # fmt: skip
    seeds, limit, temperature = options.pop("seeds"), options["max_new_tokens"], options.pop("temperature")
    starts = [Request(prompt, seed, limit, temperature) for prompt, seed in zip(asked, seeds, strict=True)]
    made = Decoder(model, options.pop("num_slots", len(asked)), **options).run(starts)
    return [(turn.ids, turn.ended) for (turn,) in made]


def drawn(logits: torch.Tensor, uniforms: list[float], temperature: float) -> list[int]:
    largest = logits.amax(dim=-1, keepdim=True)
    temperatures = torch.full((len(logits),), temperature, dtype=torch.float64)
    return pick(logits, largest, torch.tensor(uniforms, dtype=torch.float64), temperatures, {temperature > 0}).tolist()


def greedy(model: PreTrainedModel, prompt: list[int], num: int, eos: list[int]) -> list[int]:
    """Hugging Face's own generation of one unpadded prompt."""
    ids = torch.tensor([prompt])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=num,
        eos_token_id=eos,
        pad_token_id=PAD,
    )
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_greedy_equals_hugging_face(make_llama: Callable[..., LlamaForCausalLM], attention: str) -> None:
    model = make_llama(attn_implementation=IMPLEMENTATIONS[attention])
    asked = prompts([1, 9, 4, 17, 30])
    for prompt, (tokens, ended) in zip(asked, run(model, asked), strict=True):
        want = greedy(model, prompt, 12, [EOS])
        assert tokens == want and ended == (want[-1] == EOS)


def test_greedy_equals_hugging_face_with_learned_positions() -> None:
    """Rotary positions forgive a shift by the padding; learned ones do not."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=261,
        n_positions=64,
        n_embd=32,
        n_layer=2,
        n_head=4,
        initializer_range=0.3,
        attn_implementation=IMPLEMENTATIONS["sdpa"],
    )
    model = GPT2LMHeadModel(config).eval()
    asked = prompts([1, 9, 17])
    assert [tokens for tokens, _ in run(model, asked)] == [greedy(model, prompt, 12, [EOS]) for prompt in asked]


def test_greedy_equals_hugging_face_while_rows_end_one_by_one(
    make_llama: Callable[..., LlamaForCausalLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any of 60 end tokens: rows end at different times and leave the batch."""
    model = make_llama()
    eos = list(range(0, 240, 4))
    asked = prompts([3, 8, 5, 21, 2, 13, 7, 11])
    want = [greedy(model, prompt, 30, eos) for prompt in asked]
    lengths = [len(w) for w in want]
    assert len(set(lengths)) >= 4, "the oracle must end rows at different times"
    sizes: list[int] = []
    real = decode.pick
    monkeypatch.setattr(decode, "pick", lambda logits, *how: sizes.append(len(logits)) or real(logits, *how))
    got = run(model, asked, max_new_tokens=30, eos_ids=frozenset(eos))
    assert [tokens for tokens, _ in got] == want
    assert [ended for _, ended in got] == [w[-1] in eos for w in want]
    assert sizes == [sum(length > step for length in lengths) for step in range(max(lengths))], "none that has ended"


def test_truncation_and_the_end_token(make_llama: Callable[..., LlamaForCausalLM]) -> None:
    model = make_llama()
    (free,) = [tokens for tokens, _ in run(model, prompts([5]), eos_ids=frozenset())]
    assert len(free) == 12
    first = free.index(free[5])
    ((tokens, ended),) = run(model, prompts([5]), eos_ids=frozenset({free[5]}))
    assert tokens == free[: first + 1] and ended
    ((tokens, ended),) = run(model, prompts([5]), eos_ids=frozenset({free[5]}), max_new_tokens=first)
    assert tokens == free[:first] and not ended, "cut before its end"
    ((tokens, ended),) = run(model, prompts([5]), eos_ids=frozenset({free[5]}), max_new_tokens=first + 1)
    assert len(tokens) == first + 1 and ended, "ending with the last token is not a cut"


def test_sampled_frequencies_match_the_softmax(make_llama: Callable[..., LlamaForCausalLM]) -> None:
    model = make_llama()
    (prompt,) = prompts([6])
    num, temperature = 4000, 0.6
    replies = run(
        model, [prompt] * num, seeds=[7919 * i + 1 for i in range(num)], temperature=temperature, max_new_tokens=1
    )
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt])).logits[0, -1].double()
    probs = torch.softmax(logits / temperature, 0).numpy()
    counts = np.bincount([tokens[0] for tokens, _ in replies], minlength=len(probs))
    likely = probs * num >= 5
    expected = np.append(probs[likely], probs[~likely].sum()) * num
    found = np.append(counts[likely], counts[~likely].sum())
    chi_square = float(((found - expected) ** 2 / expected).sum())
    freedom = len(expected) - 1
    assert freedom > 10 and chi_square < freedom + 4 * math.sqrt(2 * freedom)


def test_a_row_depends_on_its_own_seed_alone(make_llama: Callable[..., LlamaForCausalLM]) -> None:
    model = make_llama()
    asked = prompts([4, 9, 6])
    base = run(model, asked, seeds=[1, 2, 3], temperature=1.0)
    other = run(model, asked, seeds=[1, 20, 30], temperature=1.0)
    assert base[0] == other[0] and base[1] != other[1] and base[2] != other[2]
    assert run(model, asked[::-1], seeds=[3, 2, 1], temperature=1.0) == base[::-1]
    assert run(model, asked[:1], seeds=[1], temperature=1.0) == base[:1]
    torch.manual_seed(0)
    assert run(model, asked, seeds=[1, 2, 3], temperature=1.0) == base


def test_a_low_temperature_is_greedy(make_llama: Callable[..., LlamaForCausalLM]) -> None:
    model = make_llama()
    asked = prompts([4, 9])
    assert run(model, asked, temperature=1e-6) == run(model, asked, temperature=0.0)


@pytest.mark.parametrize(
    ("uniform", "want"), [(0.0, 1), (0.2499, 1), (0.2501, 2), (0.49, 2), (0.51, 4), (0.999999, 4), (1 - 2**-53, 4)]
)
def test_pick_inverts_the_distribution(uniform: float, want: int) -> None:
    """Probabilities 0, ¼, ¼, 0, ½: a token without probability is never drawn."""
    probs = torch.tensor([[0.0, 0.25, 0.25, 0.0, 0.5]])
    assert drawn(probs.log(), [uniform], 1.0) == [want]


def test_pick_sharpens_with_temperature_and_takes_the_first_of_equals() -> None:
    probs = torch.tensor([[0.2, 0.8]])
    level = 0.2**2 / (0.2**2 + 0.8**2)
    assert [drawn(probs.log(), [u], 0.5) for u in (level - 1e-6, level + 1e-6)] == [[0], [1]]
    assert drawn(torch.tensor([[1.0, 3.0, 3.0], [2.0, 1.0, 2.0]]), [0.9, 0.9], 0.0) == [1, 0]


def test_probabilities_are_added_up_as_integers(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA adds floating-point numbers up in an order that varies, which exact mode forbids."""
    kinds: list[torch.dtype] = []
    real = torch.Tensor.cumsum
    monkeypatch.setattr(torch.Tensor, "cumsum", lambda x, **how: kinds.append(x.dtype) or real(x, **how))
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    before = logits.clone()
    together = drawn(logits, [0.1, 0.5, 0.9], 0.7)
    assert together == [drawn(row[None], [u], 0.7)[0] for row, u in zip(logits, [0.1, 0.5, 0.9], strict=True)]
    assert set(kinds) == {torch.int64} and torch.equal(logits, before)


@pytest.mark.parametrize("size", [3, 4, 5, 1000, 128256])
def test_the_largest_uniform_number_draws_no_token_without_probability(size: int) -> None:
    """All of the mass is on the first two tokens; equal weights come closest to overflowing the sum."""
    logits = torch.full((1, size), -torch.inf)
    logits[0, :2] = 0.0
    assert drawn(logits, [1 - 2**-53], 1.0) == [1] and drawn(logits, [0.0], 1.0) == [0]
    assert drawn(torch.zeros(1, size), [1 - 2**-53], 1.0) == [size - 1]
    assert drawn(torch.zeros(1, size), [0.5], 1.0) == [size // 2]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("block", [1, 4])
def test_infinities_of_one_row_never_reach_another(
    make_llama: Callable[..., LlamaForCausalLM], temperature: float, block: int
) -> None:
    """A unit ends with an error in the middle of others; what its slots hold is nothing to the next unit's rows."""
    model = make_llama()
    with torch.no_grad():
        model.get_input_embeddings().weight[251] = torch.inf
    healthy = [Request(prompt, row, 20, temperature) for row, prompt in enumerate(prompts([3, 9, 5, 4, 8]))]
    broken = Request([251] * 40, 9, 20, temperature, "the broken row")
    options: dict[str, Any] = {
        "max_new_tokens": 20, "eos_ids": frozenset(range(0, 240, 8)), "block": block,
    }  # fmt: skip
    want = Decoder(model, 4, **options).run(healthy)
    used = Decoder(model, 4, **options)
    with pytest.raises(RunError, match=r"^the broken row: the model's logits became NaN or infinite"):
        used.run([*healthy[:3], broken])
    assert any(not part.isfinite().all() for part in used.slots._parts)
    assert used.run(healthy) == want


def test_a_slot_is_empty_when_a_row_gets_it(make_llama: Callable[..., LlamaForCausalLM]) -> None:
    """Within a unit too: a row whose keys hold infinities can have logits that are numbers."""
    slots = Slots(3, torch.device("cpu"))
    slots.reserve(10)
    keys, values = slots.kept(Place(0), torch.zeros(1, 2, 4), torch.zeros(1, 2, 6))
    for part in (keys, values):
        part[:, :10] = torch.nan
    slots.lengths = [4, 5, 6]
    slots.clear(1, 3)
    assert slots.lengths == [4, 0, 0]
    assert all(part[1:].isfinite().all() and part[0, :10].isnan().all() for part in (keys, values))
    slots.clear(0, 3)
    assert not keys.any() and not values.any()

    class Spy(Decoder):
        def _fill(self, queue: Any) -> None:
            first = len(self._rows)
            super()._fill(queue)
            new = slice(first, len(self._rows))
            nonzero = any(part[:, new].any() for part in self.slots._parts)
            assert not nonzero and not any(self.slots.lengths[new])

    decoder = Spy(make_llama(), 2, max_new_tokens=9, eos_ids=frozenset(range(0, 240, 8)), block=3)
    for _ in range(2):
        decoder.run([Request(prompt, row, 9, 1.0) for row, prompt in enumerate(prompts([3, 9, 5, 4, 8]))])


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(-30, 30), min_size=1, max_size=20), st.floats(0, 1, exclude_max=True), st.floats(0.05, 3))
def test_pick_is_the_smallest_token_whose_cumulative_probability_exceeds(
    logits: list[float], uniform: float, temperature: float
) -> None:
    scaled = np.array(logits) / temperature
    probs = np.exp(scaled - scaled.max())
    cumulative = np.cumsum(probs / probs.sum())
    (got,) = drawn(torch.tensor([logits], dtype=torch.float64), [uniform], temperature)
    assert cumulative[got] >= uniform - 1e-9 and (got == 0 or cumulative[got - 1] <= uniform + 1e-9)


def one_cumulative_sum(logits: torch.Tensor, uniforms: list[float], temperature: float) -> list[int]:
    """The definition: one sum over all tokens of ⌊2^b · p / p_max⌋, without blocks."""
    size = logits.shape[-1]
    scaled = logits.double() / temperature
    weights = (scaled - scaled.amax(dim=-1, keepdim=True)).exp() * 2.0 ** (62 - (size - 1).bit_length())
    cumulative = weights.to(torch.int64).cumsum(dim=-1)
    total = cumulative[:, -1]
    level = torch.minimum((torch.tensor(uniforms, dtype=torch.float64) * total.double()).to(torch.int64), total - 1)
    return torch.searchsorted(cumulative, level[:, None], right=True)[:, 0].tolist()


EDGES = [0.0, 2**-53, 0.5 - 2**-54, 0.5, 1 - 2**-53]


@settings(max_examples=300, deadline=None)
@given(
    st.integers(1, 2000),
    st.integers(0, 2**32 - 1),
    st.sampled_from(EDGES) | st.floats(0, 1, exclude_max=True),
    st.sampled_from([0.05, 0.7, 1.0, 3.0]),
    st.sampled_from([0.0, 0.5, 0.999]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
)
def test_blocks_draw_the_token_of_one_sum(
    size: int, seed: int, uniform: float, temperature: float, barred: float, dtype: torch.dtype
) -> None:
    """Integers add up alike in any order, so for every uniform number; barred tokens have a logit of −∞."""
    rng = np.random.default_rng(seed)
    logits = torch.from_numpy(rng.normal(0, 4, size=(2, size))).to(dtype)
    logits[torch.from_numpy(rng.random((2, size)) < barred)] = -torch.inf
    logits[:, int(rng.integers(size))] = 1.0
    uniforms = [uniform, float(rng.random())]
    assert drawn(logits, uniforms, temperature) == one_cumulative_sum(logits, uniforms, temperature)


@pytest.mark.parametrize("size", [BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK])
def test_every_level_of_equal_weights_draws_its_token(size: int) -> None:
    """Just below, at and just above the border between two tokens, at the borders of blocks too."""
    logits = torch.zeros(1, size)
    for token in range(size):
        for uniform in (token / size, math.nextafter(token / size, 1), math.nextafter((token + 1) / size, 0)):
            assert drawn(logits, [uniform], 1.0) == one_cumulative_sum(logits, [uniform], 1.0)


def test_greedy_and_sampled_rows_share_a_batch() -> None:
    """Each by its own temperature: as in batches of one kind."""
    logits = torch.randn(4, 700, generator=torch.Generator().manual_seed(0))
    largest, uniforms = logits.amax(dim=-1, keepdim=True), torch.tensor([0.1, 0.4, 0.7, 0.99], dtype=torch.float64)
    temperatures = torch.tensor([0.7, 0.0, 1.5, 0.0], dtype=torch.float64)
    together = pick(logits, largest, uniforms, temperatures, {True, False}).tolist()
    alone = [drawn(logits[i : i + 1], [uniforms[i].item()], temperatures[i].item())[0] for i in range(4)]
    assert together == alone and together[0] != logits[0].argmax()
