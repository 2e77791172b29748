"""Llama, Qwen, Mistral and Gemma: the numbers equal a plain forward pass, and a whole round runs.

Tiny random models of each architecture, with what sets it apart: sliding windows shorter than the prompts (Mistral,
Gemma), soft-capped logits and scores, scaled queries (Gemma), biases (Qwen 2), normed heads (Qwen 3, Gemma 3), tied
embeddings, and each family's own form of chat template over bytes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from fedsim.attention.prefix import candidate_logits, read_head
from fedsim.base.ranks import OneRank
from fedsim.config import load_config
from fedsim.config.lora import LoraSettings
from fedsim.data.batch import collate
from fedsim.data.chat import ChatFormat, Conversation, TokenRow, assistant_turn, user_turn
from fedsim.generate.decode import Decoder, Request
from fedsim.model.load import LoadedModel, load_model
from fedsim.model.logprobs import target_logprobs
from fedsim.parallel.world import process_world
from fedsim.record.metrics import read_rows
from fedsim.report import finish
from fedsim.run.simulation import Simulation
from fedsim.safety.guard import LlamaGuard
from fedsim.world import square_rows

ALTERNATE = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}{% endfor %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
QWEN2 = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a "
    "helpful assistant.<|im_end|>\n{% endif %}{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN3 = (  # the last reply is written with its thoughts, earlier ones without
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' and loop.last %}<think>\n\n"
    "</think>\n\n{% endif %}{{ m['content'].lstrip('\n') }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
MISTRAL = ALTERNATE + (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] | trim }}{{ eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}" + ALTERNATE + "{% for m in messages %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else "
    "m['role'] }}\n{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


@dataclass(frozen=True)
class Family:
    """An architecture: its configuration, chat template, special tokens, bos and eos."""

    config: type[PretrainedConfig]
    template: str
    specials: tuple[str, ...]
    bos: str | None
    eos: str
    changes: tuple[tuple[str, Any], ...] = ()
    end_of_turn: str = ""  # where it is not eos

    @property
    def end(self) -> str:
        return self.end_of_turn or self.eos


LLAMA3_TOKENS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|pad|>")
CHATML_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
GEMMA_TOKENS = ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>")
WINDOW = 12
FAMILIES = {
    "llama": Family(LlamaConfig, LLAMA3, LLAMA3_TOKENS, "<|begin_of_text|>", "<|eot_id|>"),
    "qwen2": Family(Qwen2Config, QWEN2, CHATML_TOKENS, None, "<|im_end|>", (("attention_dropout", 0.1),)),
    "qwen3": Family(Qwen3Config, QWEN3, CHATML_TOKENS, None, "<|im_end|>", (("head_dim", 8),)),
    "mistral": Family(
        MistralConfig, MISTRAL, ("<s>", "</s>", "[INST]", "[/INST]"), "<s>", "</s>", (("sliding_window", WINDOW),)
    ),
    # The older Mistral tokenizers write their markers as ordinary text.
    "mistral-text-markers": Family(MistralConfig, MISTRAL, ("<s>", "</s>"), "<s>", "</s>", (("sliding_window", None),)),
    "gemma2": Family(
        Gemma2Config, GEMMA, GEMMA_TOKENS, "<bos>", "<eos>",
        (("sliding_window", WINDOW), ("head_dim", 8), ("query_pre_attn_scalar", 20), ("final_logit_softcapping", 2.0),
         ("attn_logit_softcapping", 3.0)), "<end_of_turn>",
    ),
    "gemma3": Family(
        Gemma3TextConfig, GEMMA, GEMMA_TOKENS, "<bos>", "<eos>",
        (("sliding_window", WINDOW), ("head_dim", 8), ("query_pre_attn_scalar", 20),
         ("layer_types", ["sliding_attention", "full_attention"])), "<end_of_turn>",
    ),
}  # fmt: skip
LORA = LoraSettings(4, 8.0, 0.1, ("q_proj", "v_proj"))
Make = Callable[..., ChatFormat]


def attentions(name: str) -> list[str]:
    return ["eager"] if name == "gemma2" else ["sdpa", "eager"]


CASES = [(name, attention) for name in FAMILIES for attention in attentions(name)]


@pytest.fixture(scope="session")
def family_dir(tmp_path_factory: pytest.TempPathFactory, make_bytes_chat: Make) -> Callable[[str], Path]:
    """``family_dir(name)``: a model directory of that architecture."""
    made: dict[str, Path] = {}

    def save(name: str) -> Path:
        if name not in made:
            family = FAMILIES[name]
            folder = tmp_path_factory.mktemp(name)
            pad = next((t for t in family.specials if "pad" in t), None)
            tokenizer = make_bytes_chat(family.template, family.specials, family.eos, family.bos, pad).tokenizer
            tokenizer.save_pretrained(str(folder))
            ids = dict(zip(family.specials, tokenizer.convert_tokens_to_ids(list(family.specials)), strict=True))
            torch.manual_seed(0)
            settings = {"vocab_size": 256 + len(family.specials), "hidden_size": 32, "intermediate_size": 48,
                        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
                        "max_position_embeddings": 4096, "initializer_range": 0.2, "eos_token_id": ids[family.eos],
                        "bos_token_id": ids.get(family.bos), "pad_token_id": ids.get(pad)}  # fmt: skip
            model = AutoModelForCausalLM.from_config(family.config(**{**settings, **dict(family.changes)}))
            # A random model hardly ever ends its turn: many bytes end it here, as a generation config may say.
            model.generation_config.eos_token_id = [ids[family.end], *range(80)]
            model.save_pretrained(str(folder))
            made[name] = folder
        return made[name]

    return save


def load(folder: Path, attention: str) -> LoadedModel:
    """Loaded as a run loads it, with an adapter that changes the output."""
    loaded = load_model(str(folder), LORA, dtype="float32", attention=attention, device=torch.device("cpu"))
    torch.manual_seed(1)
    for parameter in loaded.model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.3)
    loaded.model.eval()
    return loaded


def ids(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, length]).integers(0, 250, length).astype(np.int32)


@torch.no_grad()
def plain_logits(model: PreTrainedModel, prompt: np.ndarray) -> torch.Tensor:
    """Logits of every position by one unpadded forward pass without a cache."""
    return model(input_ids=torch.from_numpy(prompt.astype(np.int64))[None], use_cache=False).logits[0]


@pytest.mark.parametrize(("name", "attention"), CASES)
def test_candidate_logits_equal_a_plain_forward(family_dir: Any, name: str, attention: str) -> None:
    """Heads and tails shorter and longer than the window, in fp64."""
    model = load(family_dir(name), attention).base.double()
    for head_length, lengths in ((3, [2, 5]), (40, [1, 30, 7]), (WINDOW, [3, WINDOW, 1]), (0, [20, 4])):
        head, tails = ids(head_length), [ids(n, seed=1) for n in lengths]
        got = candidate_logits(model, read_head(model, head), tails, [7, 90, 3])
        want = torch.stack([plain_logits(model, np.concatenate([head, tail]))[-1, [7, 90, 3]] for tail in tails])
        torch.testing.assert_close(got, want, atol=1e-10, rtol=0)
    assert want.std() > 0.05


@pytest.mark.parametrize(("name", "attention"), CASES)
def test_greedy_decoding_equals_hugging_face(family_dir: Any, name: str, attention: str) -> None:
    """Prompts and replies that outgrow the window, in a batch from which rows leave."""
    loaded = load(family_dir(name), attention)
    asked = [ids(n, seed=2).tolist() for n in (2, 31, 9, WINDOW, 50)]
    decoder = Decoder(loaded.base, 3, max_new_tokens=24, eos_ids=frozenset({9, 77, 130, 201}))
    replies = decoder.run([Request(prompt, 0, 24, 0.0) for prompt in asked])
    for prompt, (turn,) in zip(asked, replies, strict=True):
        sent = torch.tensor([prompt])
        made: Any = loaded.base.generate(
            sent, attention_mask=torch.ones_like(sent), do_sample=False, max_new_tokens=24,
            eos_token_id=[9, 77, 130, 201], pad_token_id=loaded.chat.pad_id,
        )  # fmt: skip
        assert turn.ids == made[0, len(prompt) :].tolist()


@pytest.mark.parametrize(("name", "attention"), CASES)
def test_training_logprobs_equal_a_plain_forward(family_dir: Any, name: str, attention: str) -> None:
    model = load(family_dir(name), attention).base
    rows = [TokenRow(ids(n, seed=3), np.arange(n) >= n // 2) for n in (5, 40, 23)]
    batch = collate(rows, torch.device("cpu"))
    got = batch.row_sums(target_logprobs(model, batch))
    for row, total in zip(rows, got, strict=True):
        logprobs = F.log_softmax(plain_logits(model, row.input_ids).double(), dim=-1)
        wanted = [logprobs[i - 1, row.input_ids[i]] for i in range(1, len(row)) if row.loss_mask[i]]
        assert float(total) == pytest.approx(float(sum(wanted)), abs=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_head_in_chunks_is_the_familys_own(family_dir: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Soft-capping and scaling of logits apply in every chunk."""
    model = load(family_dir(name), attentions(name)[0]).base
    batch = collate([TokenRow(ids(n, seed=3), np.arange(n) >= n // 2) for n in (5, 40, 23)], torch.device("cpu"))
    with torch.no_grad():
        whole = target_logprobs(model, batch)
        monkeypatch.setattr("fedsim.model.logprobs.MAX_LOGITS", 7 * int(model.config.get_text_config().vocab_size))
        heads: list[int] = []
        model.get_output_embeddings().register_forward_pre_hook(lambda module, inputs: heads.append(inputs[0].shape[1]))
        torch.testing.assert_close(target_logprobs(model, batch), whole, atol=1e-6, rtol=1e-5)
    assert len(whole) > 7 and max(heads) == 7 and sum(heads) == len(whole)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_guards_probabilities_equal_a_plain_forward(family_dir: Any, name: str) -> None:
    """The family's own turn around the guard's prompt; the heads are far longer than the window."""
    loaded = load(family_dir(name), attentions(name)[0])
    judge = LlamaGuard(
        loaded.base, loaded.chat, OneRank(), policy="square", batch_tokens=600, threshold=0.5, max_length=3000
    )
    exchanges = [("A kite?", "Yes."), ("Who?", "Orla flies it."), ("Why?", "Wind, and more wind.")]
    for (user, agent), verdict in zip(exchanges, judge.judge_exchanges(exchanges), strict=True):
        prompt, _ = judge.format.prompt(user, agent)
        assert loaded.chat.prompt_ids([user_turn("x")])[0] == prompt[0]
        pair = plain_logits(loaded.base, prompt)[-1, [judge.format.safe_id, judge.format.unsafe_id]]
        assert verdict.unsafe_prob == pytest.approx(float(pair.double().softmax(dim=0)[1]), abs=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_turn_ends_with_the_familys_own_token(family_dir: Any, name: str) -> None:
    """It is learned, it ends a reply, and a user's text cannot write it."""
    loaded = load(family_dir(name), attentions(name)[0])
    chat = loaded.chat
    end = chat.tokenizer.convert_tokens_to_ids(FAMILIES[name].end)
    asked: Conversation = [user_turn("A kite?"), assistant_turn("Yes."), user_turn(" Why? ")]
    row = chat.training_row([*asked, assistant_turn("Wind.")], 4000)
    assert row.input_ids[: len(row) - row.num_targets].tolist() == chat.prompt_ids(asked)
    assert row.input_ids[-1] == end and chat.decode(row.input_ids[row.loss_mask]) == "Wind."
    assert end in ChatFormat(chat.tokenizer).end_ids, "a reply ends there though no generation config says so"
    assert chat.end_ids >= {end, *range(80)}, "and where the model's own configuration ends it"
    markers = {"[INST]", "[/INST]", *FAMILIES[name].specials}
    forged = chat.render([user_turn("".join(sorted(markers)))], reply_follows=True)
    honest = chat.render([user_turn("x")], reply_follows=True)
    if "mistral" not in name:
        markers -= {"[INST]", "[/INST]"}
    assert {m: forged.count(m) for m in markers} == {m: honest.count(m) for m in markers}


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "mistral-text-markers"])
def test_a_whole_round_runs(
    family_dir: Any, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The architecture as the model and as the guard: fine-tuned, scoring, training, CAI, evaluation."""
    rows = square_rows()
    some = [r for label in (0, 1) for r in [r for r in rows if r["acceptable?"] == label][:12]]
    square = tmp_path / "square.json"
    square.write_text(json.dumps(some), encoding="utf-8")
    folder = family_dir(name)
    words = [
        f"model.path={folder}", f"guard.path={folder}", f"model.attention={attentions(name)[0]}", f"name={name}",
        f"data.square={square}", f"record.dir={tmp_path}", f"record.artefacts={tmp_path / 'artefacts'}",
        "data.federated_rows=10", "data.guard_rows=4", "data.cai_rows=4", "federation.num_clients=2",
        "federation.clients_per_round=2", "federation.num_rounds=1", "local.steps=1", "local.batch_size=2",
        "local.micro_batch_size=2", "guard.kind=llama_guard", "guard.policy=square", "guard.tune_epochs=1",
        "guard.tune_batch_size=4", "guard.max_length=3000", "guard.batch_tokens=2000", "guard.threshold=0.9999",
        "cai.iterations=1", "cai.batch_size=2", "cai.constitution=tiny", "cai.max_new_tokens=8", "cai.max_length=1500",
        "local.max_length=400", "eval.limit=2", "eval.max_new_tokens=4", "eval.batch_size=4", "wandb.mode='off'",
    ]  # fmt: skip
    config = load_config(None, words)
    monkeypatch.setattr(finish, "write_plots", lambda *_: [])
    with process_world(exact=True, threads=1, timeout_s=60, device="cpu") as world:
        Simulation(config, world).run()
    stages = {row["stage"]: row for row in read_rows(tmp_path / name / "metrics.jsonl")}
    assert {"filter", "eval", "cai_data", "round"} <= set(stages)
    manifest = json.loads((tmp_path / name / "manifest.json").read_text())
    assert manifest["attention"] == dict.fromkeys(("model", "guard"), f"{attentions(name)[0]} (asked for)")
    said = capsys.readouterr().err
    assert f"attention of the guard: {attentions(name)[0]} (asked for)" in said
    off = [f"dropout of the {r}'s base is off, LoRA's alone counts: attention_dropout=0.1" for r in ("model", "guard")]
    assert [line in said for line in off] == [name == "qwen2"] * 2
    assert stages["round"]["cai/num_iterations"] == 1 and stages["round"]["client/loss"] > 0
