"""Architecture and tokenizer of the tiny chat model, a Llama of well under a million parameters.

The tokenizer is byte-level BPE that takes a known word whole (as Llama 3's does) and falls back to
bytes, so that any text round-trips; its words are those of the tiny world and of the guard prompt,
and some common English ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fedsim.data.guard_prompt import POLICIES, render_guard_prompt
from fedsim.world import choices, conversations, helpful, questions, replies
from fedsim.world.lexicon import SLOT_WORDS
from fedsim.world.vocabulary import COMMON_WORDS, FALLBACK_MERGES

TINY_DIR: Final = Path(__file__).parent / "tiny"
CONTEXT: Final = 4096
WIDTH, LAYERS, HEADS, FEED_FORWARD = 96, 3, 4, 256

BOS, HEADER, END_HEADER, EOT, PAD = (
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|pad|>",
)
CHAT_TEMPLATE: Final = (
    "{{- bos_token }}"
    "{%- for message in messages %}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{{- message['content'] | trim + '<|eot_id|>' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}"
    "{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{%- endif %}"
)
# Words, digits and signs one by one, each with the blank before it; "\n\n" and HHH's triple
# brackets are one piece.
_PIECES: Final = r" ?\p{L}+| ?\p{N}| ?\[\[\[| ?\]\]\]| ?[^\s\p{L}\p{N}]|\n\n|\s"


def world_texts() -> Iterable[str]:
    """Yield every fixed text of the world with its slots filled once.

    All other slot words are in the lexicon.
    """
    first = {name: words[0] for name, words in SLOT_WORDS.items()}
    first |= {"list": "hat, kite", "words": "hat"}

    # Sensitive questions and their replies.
    templates: list[str] = []
    for frames in questions.FRAMES.values():
        templates += frames
    for by_kind in (replies.CAREFUL, replies.CARELESS):
        for reply_set in by_kind.values():
            templates += reply_set.sentences()

    # Helpful tasks, honesty, openers and closers, critiques and the guard's hazard.
    for tasks in helpful.TASKS.values():
        for task in tasks:
            for turn in task:
                templates += [turn.user, turn.short, turn.sentence, turn.explanation]
    for texts in helpful.HONESTY:
        templates += texts
    templates += [
        *replies.OPENERS,
        *replies.CLOSERS,
        *helpful.UNCLEAR,
        *helpful.ECHO,
        *conversations.CRITIQUES.values(),
    ]
    templates += [
        conversations.NO_CRITIQUE,
        conversations.UNCLEAR_CRITIQUE,
        conversations.HAZARD_VERDICT,
        conversations.SAFE_VERDICT,
    ]
    for pair in conversations.PRINCIPLES:
        templates += pair
    templates += conversations.HAZARD_TEXTS

    # The frames of A/B items and guard prompts have no slots.
    yield from (template.format(**first) for template in templates)
    yield choices.Choice("honest", "", "", "", False).prompt(better_first=True)
    for policy in POLICIES:
        yield render_guard_prompt("Yes.", "No.", policy)
        yield render_guard_prompt("Yes.", None, policy)
    yield from ("system", "user", "assistant")


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build the tokenizer from the texts of the world, without training and draws."""
    splitter = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    # Known pieces: those of all texts and words, with and without a blank before them.
    texts = list(world_texts())
    for words in (*SLOT_WORDS.values(), COMMON_WORDS):
        texts.append(" ".join(["", *words]))
    pieces: set[str] = set()
    for text in texts:
        for padded in (text, f" {text}"):
            pieces.update(piece for piece, _ in splitter.pre_tokenize_str(padded))

    # Vocabulary: bytes, merges of the fallback, known pieces, each once.
    merges = [(a, b) for a, b in FALLBACK_MERGES]
    entries = sorted(pre_tokenizers.ByteLevel.alphabet())
    entries += [a + b for a, b in merges]
    entries += sorted(pieces)
    vocab = {entry: i for i, entry in enumerate(dict.fromkeys(entries))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t in (BOS, HEADER, END_HEADER, EOT, PAD)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOT,
        pad_token=PAD,
        additional_special_tokens=[HEADER, END_HEADER],
        chat_template=CHAT_TEMPLATE,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """Build a model with weights drawn from ``seed``.

    Projections into the residual stream are scaled by 1 / sqrt(2 * layers).
    """
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=FEED_FORWARD,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=CONTEXT,
        initializer_range=0.06,  # copying emerges in half the steps that the usual 0.02 takes
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    # The caller's random state is left as it is.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.mul_(1 / math.sqrt(2 * LAYERS))
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return model
