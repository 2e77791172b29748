"""The self-test passes what is right and names what is wrong, with each fault in the case that it is in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import DeepseekV3Config, Gemma2Config, LlamaConfig, MistralConfig

from fedsim.attention import self_test
from fedsim.attention.backends import BACKENDS, Cached, Eager, Scores, Sdpa
from fedsim.attention.self_test import Heads, distances, fault, heads_of
from fedsim.attention.spans import Spans

CPU = torch.device("cpu")
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
HEADS = Heads(4, 2, 8, 8, window=20)
PACKED = "rows of 1 to 300 tokens"


@pytest.fixture(autouse=True)
def _fresh() -> Any:
    self_test._fault.cache_clear()
    yield
    self_test._fault.cache_clear()


@pytest.fixture()
def exact() -> Any:
    """torch's algorithms are deterministic, as in exact mode."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


class Faulty(Sdpa):
    """Right but for one fault."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.num_calls = 0

    def spans(self, query: Any, key: Any, value: Any, spans: Spans, scores: Scores) -> torch.Tensor:
        self.num_calls += 1
        if self.kind == "raises":
            raise RuntimeError("no kernel image\nis available")
        if self.kind == "prefix" and not spans.is_plain:
            scores = replace(scores, scale=scores.scale * 1.2)
        if self.kind == "window":
            scores = replace(scores, window=None if scores.window is None else scores.window + 1)
        out = super().spans(query, key, value, spans, scores)
        if self.kind == "short":  # the second row, of two tokens, is another one's
            out = torch.cat([out[:1], out[3:5], out[3:]])
        if self.kind in ("dq", "dk", "dv"):
            part = {"dq": query, "dk": key, "dv": value}[self.kind]
            out = out + 0.1 * (part.sum() - part.sum().detach())
        if self.kind == "moves" and self.num_calls % 2:
            out = out * (1 + 1e-6)
        return torch.full_like(out, torch.nan) + 0 * out if self.kind == "nan" else out

    def slots(self, query: Any, cached: Cached, scores: Scores) -> torch.Tensor:
        off = 1 if self.kind == "slots" else 0
        return super().slots(query, replace(cached, lengths=(cached.lengths - off).clamp(min=1)), scores)


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("name", ["sdpa", "eager"])
@pytest.mark.parametrize("heads", [HEADS, Heads(6, 6, 16, 24)])
def test_right_backends_pass(name: str, dtype: torch.dtype, heads: Heads, exact: None) -> None:
    assert fault(name, heads, dtype, CPU) is None


@pytest.mark.parametrize("kernel", ["varlen", "varlen 2.11", "flash_attention_2"])
def test_stand_ins_of_cudas_kernels_pass(stand_in: Callable[[str], str], kernel: str, exact: None) -> None:
    assert fault(stand_in(kernel), HEADS, F32, CPU) is None


def test_capped_scores_are_compared(monkeypatch: pytest.MonkeyPatch, stand_in: Callable[[str], str]) -> None:
    capped = replace(HEADS, softcap=2.0)
    assert fault(stand_in("flash_attention_2"), capped, F32, CPU) is None

    class Forgets(Eager):
        def spans(self, query: Any, key: Any, value: Any, spans: Spans, scores: Scores) -> torch.Tensor:
            return super().spans(query, key, value, spans, replace(scores, softcap=None))

    monkeypatch.setitem(BACKENDS, "flash_attention_2", Forgets())
    self_test._fault.cache_clear()
    assert "is 0." in (fault("flash_attention_2", capped, F32, CPU) or "")


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("short", f"its self-test failed: out of {PACKED} is "),
        ("dq", f"its self-test failed: dq of {PACKED} is "),
        ("dk", f"its self-test failed: dk of {PACKED} is "),
        ("dv", f"its self-test failed: dv of {PACKED} is "),
        ("nan", f"its self-test failed: out of {PACKED} is nan off, "),
        ("prefix", f"its self-test failed: out of {PACKED} behind a prefix is "),
        ("window", f"its self-test failed: out of {PACKED}, a window of 20 is "),
        ("slots", "its self-test failed: out of a step of decoding is "),
        ("raises", "its self-test ended with RuntimeError: no kernel image is available"),
    ],
)
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_a_wrong_backend_is_named(monkeypatch: pytest.MonkeyPatch, kind: str, words: str, dtype: torch.dtype) -> None:
    monkeypatch.setitem(BACKENDS, "sdpa", Faulty(kind))
    found = fault("sdpa", HEADS, dtype, CPU)
    assert found is not None and found.startswith(words), found
    if kind != "raises":
        assert found.endswith(f" off, {0.01 if dtype == BF16 else 1e-5:g} is allowed")


def test_bits_that_move_count_in_exact_mode_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS, "sdpa", Faulty("moves"))
    assert fault("sdpa", HEADS, F32, CPU) is None
    torch.use_deterministic_algorithms(True)
    try:
        assert fault("sdpa", HEADS, F32, CPU) == f"its self-test failed: out of {PACKED} has other bits the second time"
    finally:
        torch.use_deterministic_algorithms(False)


def test_the_answer_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = Faulty("none")
    monkeypatch.setitem(BACKENDS, "sdpa", backend)
    assert [fault("sdpa", HEADS, F32, CPU) for _ in range(3)] == [None] * 3
    assert backend.num_calls == 4, "packed rows and rows behind a prefix, with a window and without"
    assert fault("sdpa", HEADS, torch.float64, CPU) is None and backend.num_calls == 8, "another type, another test"


def test_no_room_is_no_fault_of_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(BACKENDS["sdpa"], "spans", full)
    with pytest.raises(torch.OutOfMemoryError):
        fault("sdpa", HEADS, F32, CPU)


def test_no_number_of_torch_s_generator_is_drawn() -> None:
    before = torch.get_rng_state()
    with torch.inference_mode(False), torch.no_grad():
        assert len(list(distances(BACKENDS["sdpa"], HEADS, F32, CPU))) == 2 * (4 + 4 + 1)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("config", "heads"),
    [
        (LlamaConfig(num_attention_heads=32, num_key_value_heads=8, hidden_size=4096), [Heads(32, 8, 128, 128)]),
        (MistralConfig(sliding_window=64), [Heads(32, 8, 128, 128, window=64)]),
        (Gemma2Config(), [Heads(8, 4, 256, 256, window=4096, softcap=50.0)]),
        (DeepseekV3Config(), [Heads(128, 128, 192, 128)]),
        (LlamaConfig(head_dim=64, global_head_dim=128), [Heads(32, 32, 64, 64), Heads(32, 32, 128, 128)]),
    ],
)
def test_heads_are_the_configuration_s(config: Any, heads: list[Heads]) -> None:
    assert list(heads_of(config)) == heads
    windows = heads[0].windows
    assert windows == {None: (None,), 64: (None, 64), 4096: (None, 100)}[heads[0].window], "rows are 300 long"
