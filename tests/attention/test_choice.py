"""Which backend a model gets, and in which words the others are passed over."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from transformers import DeepseekV3Config, Gemma2Config, LlamaConfig, PretrainedConfig

from fedsim.attention import choice
from fedsim.attention.backends import BACKENDS
from fedsim.attention.choice import ORDER, Choice, agreed, choose
from fedsim.attention.forward import IMPLEMENTATIONS
from fedsim.base.errors import ModelError
from fedsim.base.ranks import OneRank

CPU, CUDA = torch.device("cpu"), torch.device("cuda")  # the latter is only looked at
BF16, F32 = torch.bfloat16, torch.float32
LLAMA, GEMMA2 = LlamaConfig(), Gemma2Config()
WRONG = "its self-test failed: dq of rows is 0.3 off, 0.01 is allowed"
NO_PACKAGE = "the flash-attn package is not installed; pip install flash-attn --no-build-isolation"
NO_CAP = "cannot cap scores, as the model asks for (attn_logit_softcapping=50.0); set model.attention=eager"


@pytest.fixture(autouse=True)
def _a_gpu_on_which_all_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "_capability", lambda device: (9, 0))
    wrong(monkeypatch)


def wrong(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Self-tests of these backends fail."""
    monkeypatch.setattr(choice, "fault", lambda name, *_: WRONG if name in names else None)


def test_every_backend_has_a_place_and_a_name() -> None:
    assert set(ORDER) == set(BACKENDS) == set(IMPLEMENTATIONS)
    assert Choice("varlen", "x").implementation == "fedsim_varlen"
    assert not any("flash" in name or "sdpa" in name for name in IMPLEMENTATIONS.values())


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_auto_on_a_cpu(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """No self-test is made, and CUDA's kernels are not worth a word."""
    monkeypatch.setattr(choice, "fault", None)
    assert choose("auto", LLAMA, dtype, CPU) == Choice("sdpa", "auto")
    found = choose("auto", GEMMA2, dtype, CPU)
    assert found.name == "eager" and found.why.startswith(f"auto; not sdpa: {NO_CAP}")


@pytest.mark.parametrize(
    ("failing", "installed", "dtype", "name"),
    [
        ((), True, BF16, "varlen"),
        ((), False, BF16, "varlen"),
        ((), True, torch.float16, "varlen"),
        ((), True, F32, "sdpa"),
        (("varlen",), True, BF16, "flash_attention_2"),
        (("varlen",), False, BF16, "sdpa"),
        (("varlen", "flash_attention_2"), True, BF16, "sdpa"),
        (("varlen", "flash_attention_2", "sdpa"), True, BF16, "eager"),
        (("sdpa",), True, F32, "eager"),
    ],
)
def test_auto_on_cuda_takes_the_best_that_passes_its_self_test(
    monkeypatch: pytest.MonkeyPatch, stand_in: Any, failing: tuple[str, ...], installed: bool, dtype: torch.dtype,
    name: str,
) -> None:  # fmt: skip
    stand_in("varlen 2.11")
    if installed:
        stand_in("flash_attention_2")
    wrong(monkeypatch, *failing)
    assert choose("auto", LLAMA, dtype, CUDA).name == name


def test_auto_on_cuda_says_what_it_passed_over(monkeypatch: pytest.MonkeyPatch, stand_in: Any) -> None:
    stand_in("varlen")
    wrong(monkeypatch, "varlen")
    found = choose("auto", LLAMA, BF16, CUDA)
    assert found.name == "sdpa" and found.why.startswith(
        f"auto; not varlen: {WRONG}; not flash_attention_2: {NO_PACKAGE}"
    )
    assert found.words == f"sdpa ({found.why})"


def test_every_shape_of_head_is_tried(monkeypatch: pytest.MonkeyPatch, stand_in: Any) -> None:
    """A model with wider heads in some layers: a backend that cannot do those is passed over."""
    stand_in("varlen")
    monkeypatch.setattr(choice, "fault", lambda name, heads, *_: WRONG if heads.size == 128 else None)
    assert choose("auto", LlamaConfig(head_dim=64), BF16, CUDA).name == "varlen"
    assert choose("auto", LlamaConfig(head_dim=64, global_head_dim=128), BF16, CUDA).name == "eager"


def test_auto_for_capped_scores_on_cuda(stand_in: Any) -> None:
    assert choose("auto", GEMMA2, BF16, CUDA).name == "eager"
    stand_in("flash_attention_2")
    assert choose("auto", GEMMA2, BF16, CUDA).name == "flash_attention_2"


# ---- all ranks take the same --------------------------------------------------------------------------------------


def of_rank(**problems: str) -> Choice:
    return choice._best({name: problems.get(name, "") for name in ORDER})


@pytest.mark.parametrize(
    ("by_rank", "name", "why"),
    [
        ([of_rank()] * 3, "varlen", "auto"),
        ([of_rank(), of_rank(varlen="bad")], "flash_attention_2", "auto; not varlen: on rank 1, bad"),
        ([of_rank(varlen="bad"), of_rank(varlen="bad")], "flash_attention_2", "auto; not varlen: bad"),
        (
            [of_rank(varlen="a"), of_rank(flash_attention_2="b"), of_rank(varlen="c")],
            "sdpa",
            "auto; not varlen: on rank 0, a; not flash_attention_2: on rank 1, b",
        ),
        ([of_rank(sdpa="bad"), of_rank()], "varlen", "auto"),
        ([Choice("sdpa", "asked for")] * 2, "sdpa", "asked for"),
    ],
)
def test_ranks_agree_on_the_best_that_all_can_take(by_rank: list[Choice], name: str, why: str) -> None:
    found = agreed(by_rank)
    assert found.name == name and found.why.startswith(why)


class Both(OneRank):
    """Two ranks, of which the second finds what it is told to."""

    def __init__(self, other: Choice | ModelError) -> None:
        self.other = other

    def each(self, compute: Any) -> list[Any]:
        mine = compute()
        if isinstance(self.other, ModelError):
            raise self.other
        return [mine, self.other]


def test_one_rank_s_failure_changes_all(stand_in: Any) -> None:
    stand_in("varlen")
    assert choose("auto", LLAMA, BF16, CUDA, OneRank()).name == "varlen"
    found = choose("auto", LLAMA, BF16, CUDA, Both(of_rank(varlen=WRONG, flash_attention_2="no package")))
    assert found.name == "sdpa" and f"not varlen: on rank 1, {WRONG}" in found.why
    with pytest.raises(ModelError, match="on another rank"):
        choose("varlen", LLAMA, BF16, CUDA, Both(ModelError("on another rank")))


@pytest.mark.parametrize(
    ("wanted", "config", "dtype", "device", "words"),
    [
        ("varlen", LLAMA, BF16, CPU, "runs only on CUDA, and this run is on cpu; set model.attention=auto"),
        ("flash_attention_2", LLAMA, BF16, CPU, "runs only on CUDA, and this run is on cpu; set model.attention=auto"),
        ("varlen", LLAMA, F32, CUDA, "computes in bfloat16 and float16, the model is float32; set model.dtype="),
        ("varlen", GEMMA2, BF16, CUDA, NO_CAP),
        ("sdpa", GEMMA2, F32, CPU, NO_CAP),
        ("flash_attention_2", LLAMA, BF16, CUDA, NO_PACKAGE),
    ],
)
def test_what_cannot_be_had_says_why_and_what_to_do(
    wanted: str, config: PretrainedConfig, dtype: torch.dtype, device: torch.device, words: str
) -> None:
    if wanted == "flash_attention_2" and device == CUDA and importlib.util.find_spec("flash_attn"):
        pytest.skip("the flash-attn package is installed")
    with pytest.raises(ModelError) as caught:
        choose(wanted, config, dtype, device)
    assert str(caught.value).startswith(f"model.attention='{wanted}': {words}") and "\n" not in str(caught.value)


def test_an_older_torch_is_named(stand_in: Any) -> None:
    stand_in("varlen 2.10")
    with pytest.raises(ModelError, match=r"has no varlen_attn that takes scale and window_size; install torch 2\.11"):
        choose("varlen", LLAMA, BF16, CUDA)


def test_what_is_asked_for_is_taken(stand_in: Any) -> None:
    for kernel in ("varlen", "flash_attention_2"):
        name = stand_in(kernel)
        assert choose(name, LLAMA, BF16, CUDA) == Choice(name, "asked for")
    assert choose("flash_attention_2", GEMMA2, BF16, CUDA).name == "flash_attention_2"
    for name in ("sdpa", "eager"):
        assert choose(name, LLAMA, F32, CPU) == Choice(name, "asked for")


def test_what_is_asked_for_but_wrong_is_refused(monkeypatch: pytest.MonkeyPatch, stand_in: Any) -> None:
    stand_in("varlen")
    wrong(monkeypatch, "varlen")
    with pytest.raises(ModelError) as caught:
        choose("varlen", LLAMA, BF16, CUDA)
    assert str(caught.value) == f"model.attention='varlen': {WRONG}; set model.attention=auto"


@pytest.mark.parametrize(
    ("config", "names", "words"),
    [
        (LlamaConfig(head_dim=512), ("varlen", "flash_attention_2"), "up to 256 numbers, the model's have 512"),
        (LlamaConfig(head_dim=80), (), ""),
        (LlamaConfig(head_dim=100), ("varlen",), "multiples of 8 up to 256 numbers, the model's have 100"),
        (LlamaConfig(hidden_size=24, num_attention_heads=2), ("varlen",), "the model's have 12"),
        (DeepseekV3Config(), ("varlen", "flash_attention_2"), "values as wide as keys, the model's heads have 192 and"),
    ],
)
def test_heads_that_cudas_kernels_refuse(
    stand_in: Any, config: PretrainedConfig, names: tuple[str, ...], words: str
) -> None:
    """Asked for: an error before the first pass. Under auto: passed over."""
    stand_in("varlen")
    stand_in("flash_attention_2")
    for name in choice.CUDA_ONLY:
        if name not in names:
            assert choose(name, config, BF16, CUDA).name == name
            continue
        with pytest.raises(ModelError, match=f"{words}.*; set model.attention=sdpa"):
            choose(name, config, BF16, CUDA)
    best = next(name for name in ORDER if name not in names)
    assert choose("auto", config, BF16, CUDA).name == best


@pytest.mark.parametrize(("capability", "runs"), [((7, 5), False), ((8, 0), True), ((12, 0), True)])
def test_a_gpu_that_the_kernels_do_not_know(
    monkeypatch: pytest.MonkeyPatch, stand_in: Any, capability: tuple[int, int], runs: bool
) -> None:
    stand_in("varlen")
    monkeypatch.setattr(choice, "_capability", lambda device: capability)
    assert choose("auto", LLAMA, BF16, CUDA).name == ("varlen" if runs else "sdpa")
    if not runs:
        with pytest.raises(ModelError, match=r"needs compute capability 8\.0 or newer, this GPU has 7\.5; set model"):
            choose("varlen", LLAMA, BF16, CUDA)


@pytest.mark.parametrize(("torch_of", "words"), [("varlen 2.11", "steps of decoding by sdpa"), ("varlen", "")])
def test_what_an_older_kernel_leaves_to_sdpa_is_said(stand_in: Any, torch_of: str, words: str) -> None:
    stand_in(torch_of)
    why = choose("varlen", LLAMA, BF16, CUDA).why
    assert why.startswith("asked for") and (words in why if words else why == "asked for")
