"""Fixtures for all tests."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fedsim.attention.forward import IMPLEMENTATIONS
from fedsim.config.lora import LoraSettings
from fedsim.data.chat import ChatFormat
from fedsim.model.flat_adapter import FlatAdapter
from fedsim.model.load import LoadedModel, attach_lora
from fedsim.world import square_rows

ROOT = Path(__file__).parents[1]
LLAMA3_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
LLAMA3_SPECIALS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|pad|>")

torch.set_num_threads(1)  # part of exact mode's contract


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real public data files; tests that need it skip where it is absent."""
    folder = Path(os.environ.get("FEDSIM_TEST_DATA") or ROOT.parent / "shared" / "data")
    if not (folder / "square").is_dir():
        pytest.skip(f"no public data files in {folder}; set FEDSIM_TEST_DATA to a folder that holds them")
    return folder


def bytes_chat(
    template: str = LLAMA3_TEMPLATE,
    specials: tuple[str, ...] = LLAMA3_SPECIALS,
    eos: str = "<|eot_id|>",
    bos: str | None = "<|begin_of_text|>",
    pad: str | None = "<|pad|>",
) -> ChatFormat:
    """A chat format whose tokens are the 256 bytes and ``specials``."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(list(specials))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token=bos, eos_token=eos, pad_token=pad)
    tokenizer.chat_template = template
    return ChatFormat(tokenizer)


def random_llama(vocab_size: int = 261, seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """A random grouped-query Llama, 2 layers of width 32, whose logits differ clearly between tokens and positions."""
    torch.manual_seed(seed)
    settings = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
        "bos_token_id": 256,
        "eos_token_id": 259,
        "pad_token_id": 260,
        "attn_implementation": IMPLEMENTATIONS["sdpa"],
        **changes,
    }
    return LlamaForCausalLM(LlamaConfig(**settings)).eval()


def adapted_llama(
    *,
    seed: int = 0,
    r: int = 4,
    dropout: float = 0.0,
    targets: tuple[str, ...] = ("q_proj", "v_proj"),
    std: float = 0.0,
) -> tuple[LoadedModel, FlatAdapter]:
    """A random Llama with LoRA in a flat adapter; normal numbers of deviation ``std`` in it, or PEFT's start if 0."""
    base = random_llama(seed=seed)
    base.requires_grad_(False)
    loaded = LoadedModel(attach_lora(base, LoraSettings(r, 2.0 * r, dropout, targets)), bytes_chat())
    flat = FlatAdapter(loaded.model)
    if std > 0:
        flat.load(torch.randn(flat.size, generator=torch.Generator().manual_seed(seed)) * std)
    else:
        flat.load(flat.initial(seed))
    return loaded, flat


@pytest.fixture(scope="session")
def make_bytes_chat() -> Callable[..., ChatFormat]:
    """``make_bytes_chat(template, specials, eos, bos, pad)``: see :func:`bytes_chat`."""
    return bytes_chat


@pytest.fixture(scope="session")
def llama3_bytes_chat() -> ChatFormat:
    """Llama 3's template and markers over bytes."""
    return bytes_chat()


@pytest.fixture(scope="session")
def make_llama() -> Callable[..., LlamaForCausalLM]:
    """``make_llama(vocab_size=261, seed=0, **config)``: see :func:`random_llama`."""
    return random_llama


@pytest.fixture(scope="session")
def make_adapted() -> Callable[..., tuple[LoadedModel, FlatAdapter]]:
    """``make_adapted(seed=, r=, dropout=, targets=, std=)``: see :func:`adapted_llama`."""
    return adapted_llama


@pytest.fixture(scope="session")
def llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a random Llama and its tokenizer, as a user would give it."""
    folder = tmp_path_factory.mktemp("llama")
    random_llama().save_pretrained(str(folder))
    bytes_chat().tokenizer.save_pretrained(str(folder))
    return folder


@dataclass(frozen=True)
class Answer:
    """What an endpoint sends back, byte for byte; ``cut`` closes the connection after so many bytes of the body."""

    body: bytes
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    cut: int | None = None


class Endpoint:
    """A server on this machine that speaks OpenAI's chat protocol, or worse.

    Attributes:
        answer: called with the number of the request (from 0) and its JSON; a text is the content of a chat completion,
            a number an HTTP error, :class:`Answer` anything else.
        requests: JSON of all requests so far.
        keys: their Authorization headers.
    """

    Answer = Answer

    def __init__(self) -> None:
        self.answer: Callable[[int, dict[str, Any]], str | int | Answer] = lambda number, request: "Rating: [[5]]"
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str] = []
        self.lock = threading.Lock()
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with endpoint.lock:
                    number = len(endpoint.requests)
                    endpoint.requests.append({"path": self.path, **request})
                    endpoint.keys.append(self.headers["authorization"])
                self.reply(endpoint.completed(endpoint.answer(number, request)))

            def reply(self, answer: Answer) -> None:
                self.send_response(answer.status)
                length = {"content-type": "application/json", "content-length": str(len(answer.body))}
                for name, value in {**length, **answer.headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(answer.body[: answer.cut])
                self.close_connection = answer.cut is not None

            def log_message(self, *_: Any) -> None:
                """Nothing."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self) -> str:
        """What ``judge.base_url`` takes."""
        return f"http://127.0.0.1:{self.server.server_port}/v1"

    @staticmethod
    def completed(answer: str | int | Answer) -> Answer:
        """The answer in full."""
        if isinstance(answer, int):
            return Answer(json.dumps({"error": {"message": "the reason given", "code": None}}).encode(), answer)
        if isinstance(answer, str):
            message = {"role": "assistant", "content": answer}
            choice = {"index": 0, "finish_reason": "stop", "message": message}
            whole = {"id": "c", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}
            return Answer(json.dumps(whole).encode())
        return answer


@pytest.fixture()
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    """A local chat endpoint that rates 5 until told otherwise; no key is set, and no proxy stands between."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    made = Endpoint()
    yield made
    made.server.shutdown()
    made.server.server_close()


@pytest.fixture()
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds of every pause that openai's client would make between two attempts, none of which is taken."""
    import anyio

    seconds: list[float] = []

    async def sleep(delay: float) -> None:
        seconds.append(delay)

    monkeypatch.setattr(anyio, "sleep", sleep)
    return seconds


JUDGE_PROMPTS = {
    "single-v1": ("You are fair.", "Rate the kite answer.\n[Q] {question}\n[A] {answer}\n{{so}}"),
    "single-math-v1": ("You are fair.", "Rate it.\n[Q] {question}\n[R] {ref_answer_1}\n[A] {answer}"),
    "single-v1-multi-turn": (
        "Rate the second answer.\n\n",
        "[Q1] {question_1} [A1] {answer_1} [Q2] {question_2} [A2] {answer_2}",
    ),
    "single-math-v1-multi-turn": (
        "",
        "[Q1] {question_1} [R1] {ref_answer_1} [Q2] {question_2} [R2] {ref_answer_2} [A1] {answer_1} [A2] {answer_2}",
    ),
}


@pytest.fixture()
def mt_folder(tmp_path: Path) -> Path:
    """A folder as FastChat has it: four questions (81 to 84; 82 is math), judge prompts above, a reference answer."""
    folder = tmp_path / "data" / "mt_bench"
    (folder / "reference_answer").mkdir(parents=True)
    questions = [
        {"question_id": 81 + i, "category": category, "turns": [f"Ask {i}?", f"Again {i}?"]}
        for i, category in enumerate(["writing", "math", "stem", "writing"])
    ]
    reference = {"question_id": 82, "choices": [{"index": 0, "turns": ["It is {2}.", "It is 3."]}]}
    prompts = [{"name": "pair-v2", "type": "pairwise", "output_format": "[[A]]"}] + [
        {"name": name, "system_prompt": system, "prompt_template": template, "output_format": "[[rating]]"}
        for name, (system, template) in JUDGE_PROMPTS.items()
    ]
    for path, rows in (
        (folder / "question.jsonl", questions),
        (folder / "reference_answer" / "gpt-4.jsonl", [reference]),
        (folder.parent / "judge_prompts.jsonl", prompts),
    ):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def square_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """150 rows of the embedded corpus, 60 of them red, as a SQuARe file."""
    rows = square_rows()
    red = [row for row in rows if row["acceptable?"] == 0][:60]
    acceptable = [row for row in rows if row["acceptable?"] == 1][:90]
    path = tmp_path_factory.mktemp("square") / "square.json"
    path.write_text(json.dumps(red + acceptable), encoding="utf-8")
    return path
