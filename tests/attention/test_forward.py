"""The one forward pass: refusals, plain calls, PEFT wrappers, and a last layer that computes the kept tokens alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma3nTextConfig,
    GPT2Config,
    GptOssConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from fedsim.attention import forward
from fedsim.attention.forward import (
    IMPLEMENTATIONS,
    Narrowed,
    Place,
    Rows,
    causal_lm,
    packed_hidden,
    packed_logits,
)
from fedsim.attention.prefix import candidate_logits, read_head
from fedsim.attention.spans import Spans
from fedsim.base.errors import ModelError
from fedsim.data.batch import collate
from fedsim.generate.decode import Decoder, Request
from fedsim.model.logprobs import target_logprobs

CPU = torch.device("cpu")
LENGTHS = [5, 1, 9, 3]
MakeLlama = Callable[..., PreTrainedModel]


def tokens(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 90, (count,), generator=torch.Generator().manual_seed(seed))


def packed(model: nn.Module, lengths: list[int] = LENGTHS) -> torch.Tensor:
    """Logits of every token of packed rows."""
    spans = Spans(lengths, device=CPU)
    ids = tokens(sum(lengths))
    return packed_logits(model, ids, spans.positions, Rows(spans), torch.arange(len(ids)))


def one_by_one(model: nn.Module, lengths: list[int] = LENGTHS) -> torch.Tensor:
    """The same by plain calls, a row each."""
    rows = tokens(sum(lengths)).split(lengths)
    return torch.cat([model(input_ids=row[None], use_cache=False).logits[0] for row in rows])


def built(config: PretrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    config._attn_implementation = IMPLEMENTATIONS["sdpa"]
    model = AutoModelForCausalLM.from_config(config).eval()
    assert isinstance(model, PreTrainedModel)
    return model


def gemma3n() -> PreTrainedModel:
    """Layers take ``[altup, 1, tokens, width]``, and the last ones borrow keys of others."""
    return built(Gemma3nTextConfig(
        vocab_size=97, hidden_size=32, intermediate_size=[48] * 4, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, vocab_size_per_layer_input=97, hidden_size_per_layer_input=8,
        num_kv_shared_layers=2, layer_types=["sliding_attention", "full_attention"] * 2, sliding_window=6,
        laurel_rank=4, activation_sparsity_pattern=[0.0] * 4, initializer_range=0.2, pad_token_id=0,
    ))  # fmt: skip


def gpt2() -> PreTrainedModel:
    """Positions are embedded, layers have another name, keys come from one product: nothing like Llama."""
    return built(GPT2Config(vocab_size=97, n_embd=32, n_layer=3, n_head=4, n_positions=64, initializer_range=0.2,
                            attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0))  # fmt: skip


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@torch.no_grad()
def test_packed_rows_equal_plain_calls_of_hugging_faces_own(make_llama: MakeLlama, kind: str) -> None:
    model = (gpt2() if kind == "gpt2" else make_llama()).double()
    got = packed(model)
    ours = one_by_one(model)
    model.set_attn_implementation("sdpa")
    theirs = one_by_one(model)
    assert theirs.std() > 0.1
    torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=0)
    torch.testing.assert_close(got, theirs, atol=1e-10, rtol=0)


@torch.no_grad()
def test_plain_calls_continue_a_cache(make_llama: MakeLlama) -> None:
    """Hugging Face's generate works with our names: queries are the last of the cache's positions."""
    model: Any = make_llama().double()
    prompt = tokens(7)[None]
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 260, "eos_token_id": 259}
    ours = model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)
    model.set_attn_implementation("sdpa")
    assert torch.equal(ours, model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings))


def test_a_padded_batch_needs_a_layout(make_llama: MakeLlama) -> None:
    ids = tokens(10).view(2, 5)
    mask = torch.ones_like(ids)
    make_llama()(input_ids=ids, attention_mask=mask)
    mask[0, :2] = 0
    with pytest.raises(AssertionError, match="need a layout"):
        make_llama()(input_ids=ids, attention_mask=mask)


@torch.no_grad()
def test_a_wrapped_model_keeps_its_adapter(make_llama: MakeLlama) -> None:
    bare = packed(make_llama())
    wrapped = get_peft_model(make_llama(), LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights=False)).eval()
    assert causal_lm(wrapped) is wrapped.get_base_model()
    found = packed(wrapped)
    torch.testing.assert_close(found, one_by_one(wrapped), atol=1e-5, rtol=0)
    assert (found - bare).abs().max() > 1e-2


class Smearing(nn.Module):
    """Mixes tokens by other means than attention, as recurrent and convolutional layers do."""

    def forward(self, hidden_states: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
        return hidden_states.cumsum(dim=1), None


def test_layers_outside_the_interface_are_refused(make_llama: MakeLlama) -> None:
    """They would carry one row's state into the next."""
    model: Any = make_llama()
    model.model.layers[1].self_attn = Smearing()
    spans = Spans(LENGTHS, device=CPU)
    words = r"LlamaForCausalLM: only 1 of its 2 layers use transformers' attention interface; .* such as Llama"
    with pytest.raises(ModelError, match=words):
        packed(model)
    with pytest.raises(ModelError, match=words):
        packed_hidden(model, tokens(sum(LENGTHS)), spans.positions, Rows(spans))


def test_attention_sinks_are_refused() -> None:
    config = GptOssConfig(vocab_size=97, hidden_size=32, intermediate_size=16, head_dim=8, num_hidden_layers=1,
                          num_attention_heads=4, num_key_value_heads=2, num_local_experts=2,
                          num_experts_per_tok=1)  # fmt: skip
    config._attn_implementation = IMPLEMENTATIONS["sdpa"]
    with pytest.raises(ModelError, match="GptOssAttention: has attention sinks, which fedsim does not compute"):
        packed(AutoModelForCausalLM.from_config(config))


def test_dropout_of_attention_is_never_asked_for(make_llama: MakeLlama) -> None:
    """It is switched off at loading; a layer that asks for it all the same must not be passed over."""
    model = make_llama(attention_dropout=0.1)
    packed(model)
    with pytest.raises(AssertionError, match="is switched off when it is loaded"):
        packed(model.train())


class Counting(Rows):
    """A layout that notes how many queries and keys each layer brings."""

    def __init__(self, spans: Spans, seen: list[tuple[int, int, int]]) -> None:
        super().__init__(spans)
        self.seen = seen

    def attend(self, backend: Any, place: Place, query: Any, key: Any, value: Any, scores: Any) -> torch.Tensor:
        self.seen.append((place.layer, len(query), len(key)))
        return super().attend(backend, place, query, key, value, scores)


class Last(Counting):
    """Each row's last token over the whole row."""

    def __init__(self, lengths: list[int], seen: list[tuple[int, int, int]]) -> None:
        self.spans = Spans([1] * len(lengths), lengths, device=CPU)
        self.seen = seen


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@torch.no_grad()
def test_a_narrowed_last_layer_equals_the_whole_one(make_llama: MakeLlama, kind: str) -> None:
    """Keys of all tokens; queries, and with them all that follows, of the kept ones."""
    model = (gpt2() if kind == "gpt2" else make_llama()).double()
    spans, seen = Spans(LENGTHS, device=CPU), []
    ids, last = tokens(sum(LENGTHS)), spans.query_starts[1:].long() - 1
    whole = packed_hidden(model, ids, spans.positions, Rows(spans))
    narrow = packed_hidden(model, ids, spans.positions, Counting(spans, seen), Narrowed(last, Last(LENGTHS, seen)))
    torch.testing.assert_close(narrow, whole[last], atol=1e-10, rtol=0)
    num_layers, total = model.config.num_hidden_layers, sum(LENGTHS)
    assert seen == [*((layer, total, total) for layer in range(num_layers - 1)), (num_layers - 1, len(LENGTHS), total)]
    torch.testing.assert_close(packed_hidden(model, ids, spans.positions, Rows(spans)), whole, atol=0, rtol=0)


class Pair(nn.Module):
    """A layer that returns a tuple, as older ones do."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, str]:
        return self.layer(*args, **kwargs), "its weights"


@torch.no_grad()
def test_a_narrowed_layer_may_return_a_tuple(make_llama: MakeLlama) -> None:
    model: Any = make_llama().double()
    spans, seen = Spans(LENGTHS, device=CPU), []
    ids, last = tokens(sum(LENGTHS)), spans.query_starts[1:].long() - 1
    whole = packed_hidden(model, ids, spans.positions, Rows(spans))
    layer = Pair(model.model.layers[-1])
    model.model.layers[-1] = layer
    kept: list[torch.Tensor] = []
    # The model wants a tensor: the tuple is taken apart once narrowing is done with it.
    with pytest.MonkeyPatch.context() as patch:
        norm = model.model.norm.forward
        patch.setattr(model.model.norm, "forward", lambda pair: (kept.append(pair[0]), norm(pair[0]))[1])
        narrow = packed_hidden(model, ids, spans.positions, Rows(spans), Narrowed(last, Last(LENGTHS, seen)))
    torch.testing.assert_close(narrow, whole[last], atol=1e-10, rtol=0)
    assert seen == [(1, len(LENGTHS), sum(LENGTHS))] and kept[0].shape == (1, sum(LENGTHS), 32)


@torch.no_grad()
def test_a_layer_of_another_shape_is_not_narrowed() -> None:
    model = gemma3n().double()
    spans = Spans(LENGTHS, device=CPU)
    ids, last = tokens(sum(LENGTHS)), spans.query_starts[1:].long() - 1
    whole = packed_hidden(model, ids, spans.positions, Rows(spans))
    narrow = packed_hidden(model, ids, spans.positions, Rows(spans), Narrowed(last, Last(LENGTHS, [])))
    assert whole.std() > 0.1 and torch.equal(narrow, whole[last])


@torch.no_grad()
def test_narrowing_leaves_the_mask_alone(make_llama: MakeLlama) -> None:
    """Its second dimension is 1, as that of a batch of one token is."""
    model: Any = make_llama()
    masks: list[Any] = []
    model.model.layers[-1].self_attn.register_forward_pre_hook(
        lambda module, args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
    )
    spans = Spans([1], device=CPU)
    packed_hidden(model, tokens(1), spans.positions, Rows(spans), Narrowed(torch.tensor([0]), Last([1], [])))
    assert len(masks) == 2 and masks[0] is masks[1] is forward._READY_MASK


def test_a_narrowed_layer_passes_no_gradient_on(make_llama: MakeLlama) -> None:
    spans = Spans([3], device=CPU)
    with pytest.raises(AssertionError, match="no gradient"):
        packed_hidden(make_llama(), tokens(3), spans.positions, Rows(spans), Narrowed(torch.tensor([2]), Rows(spans)))


@pytest.mark.parametrize("kernel", ["varlen", "varlen 2.11", "flash_attention_2"])
def test_the_whole_product_path_on_cudas_kernels_equals_sdpa(
    stand_in: Any, make_llama: MakeLlama, make_rows: Callable[..., Any], kernel: str
) -> None:
    """Training's log-probabilities and gradients, the guard's logits, decoding from which rows leave."""
    results = []
    for name in (stand_in(kernel), "sdpa"):
        model: Any = make_llama(attn_implementation=IMPLEMENTATIONS[name]).double()
        batch = collate(make_rows([9, 4, 17]), CPU)
        logprobs = target_logprobs(model, batch)
        logprobs.sum().backward()
        gradients = [parameter.grad for parameter in model.parameters()]
        head, tails = tokens(11).numpy(), [tokens(n, seed=n).numpy() for n in (3, 8, 1)]
        scores = candidate_logits(model, read_head(model, head), tails, [7, 90])
        starts = [Request(tokens(n, seed=n).tolist(), 0, 12, 0.0) for n in (2, 13, 5)]
        decoder = Decoder(model, 3, max_new_tokens=12, eos_ids=frozenset(range(0, 250, 9)))
        replies = [(turn.ids, turn.ended) for (turn,) in decoder.run(starts)]
        results.append((logprobs.detach(), gradients, scores, replies))
    (mine, my_gradients, my_scores, my_replies), (theirs, gradients, scores, replies) = results
    torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=0)  # the loss is in fp32
    for a, b in zip(my_gradients, gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(my_scores, scores, atol=1e-10, rtol=0)
    assert my_replies == replies and len({len(ids) for ids, _ in replies}) > 1
