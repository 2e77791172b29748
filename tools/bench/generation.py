"""Generation: one turn and CAI's three, beside Hugging Face's ``generate`` with its batch size tuned.

Every row gets exactly the reply length that SQuARe's histogram draws for it, on both sides: ours by the row's limit,
theirs by a stopping criterion per row. Both see the rows sorted by the length of their prompts, and both have LoRA
beside its weights, not merged into them, as runs do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from functools import partial

import torch
from peft import PeftModel
from transformers import PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from fedsim.attention.choice import CUDA_ONLY
from fedsim.attention.forward import IMPLEMENTATIONS
from fedsim.config.measuring import EvalConfig
from fedsim.generate.decode import Decoder, Request
from fedsim.generate.engine import CUDA_BLOCK
from fedsim.generate.graph import Capture, Graphs, capture_cuda
from fedsim.model.cost import ModelCost, decode_work
from fedsim.study.bench_rows import Correctness, Row, Target
from tools.bench.attention import available
from tools.bench.lengths import draw, random_ids
from tools.bench.measure import deterministic, percentiles, seconds_of, take_turns
from tools.bench.plain_loop import PeerModel
from tools.bench.stage import Bench, give_memory_back

TURNS = 3
BATCHES = {False: (16, 32, 64), True: (64, 128, 256)}  # of theirs, by whether CUDA
OURS = {False: (EvalConfig.batch_size, 16), True: (128, 256)}  # slots; the first also of three turns
SAID = {EvalConfig.batch_size: " (default)", 128: " (configs/paper)"}  # of a number of slots
ROWS = {False: 64, True: 256}
LEAST = {False: 7, True: 2}  # repeats, however long they take
CHECKED = {False: (12, TURNS), True: (6, 2)}  # rows and turns; graphs are checked on one turn
ASKED = 30  # tokens of a later turn's question, with the chat template's
MEAN = 55.0


class Conversations:
    """Rows with the lengths of their prompts and replies.

    Attributes:
        replies: tokens of each reply, by turn.
    """

    def __init__(self, bench: Bench, num_rows: int, num_turns: int) -> None:
        self.bench = bench
        vocabulary = bench.size.vocab_size
        lengths = sorted(draw("prompt", num_rows, MEAN), reverse=True)
        self.prompts = [random_ids(length, vocabulary, "prompt", i) for i, length in enumerate(lengths)]
        self.replies = [draw("reply", num_rows, MEAN, seed=1 + turn) for turn in range(num_turns)]
        self.asks = [[random_ids(ASKED, vocabulary, "ask", t, i) for i in range(num_rows)] for t in range(1, num_turns)]

    @property
    def num_tokens(self) -> int:
        """New tokens of all turns."""
        return sum(map(sum, self.replies))

    def thinned(self, count: int) -> Conversations:
        """About ``count`` of the rows, evenly from the longest to the shortest."""
        some, every = copy(self), max(1, len(self.prompts) // count)
        some.prompts = self.prompts[::every]
        some.replies = [turn[::every] for turn in self.replies]
        some.asks = [turn[::every] for turn in self.asks]
        return some

    def least_passes(self, num_slots: int) -> int:
        """A row's tokens come one after another, and a pass gives each slot one."""
        chain = max(map(sum, zip(*self.replies, strict=True)))
        return max(chain, -(-self.num_tokens // num_slots))

    def follow(self, turn: int, prompts: Sequence[Sequence[int]], made: Sequence[Sequence[int]]) -> list[list[int]]:
        """Prompts of ``turn``: the last one's, what was replied, and the next question."""
        return [[*p, *m, *ask] for p, m, ask in zip(prompts, made, self.asks[turn - 1], strict=True)]

    def ours(
        self, model: PreTrainedModel, num_slots: int, temperature: float, capture: Capture | None = capture_cuda
    ) -> list[list[list[int]]]:
        """Ids by row and turn; None takes no graphs, and neither does :func:`capture_cuda` without a GPU."""
        has_graphs = capture is not None and (self.bench.cuda or capture is not capture_cuda)
        decoder = Decoder(
            model,
            num_slots,
            max_new_tokens=max(map(max, self.replies)),
            eos_ids=frozenset(),
            graphs=Graphs(capture) if capture is not None and has_graphs else None,
            block=CUDA_BLOCK if self.bench.cuda or has_graphs else 1,
        )
        said: list[list[list[int]]] = [[prompt] for prompt in self.prompts]

        def then(row: int, ids: list[int]) -> Request | None:
            turn = len(said[row])
            if turn == len(self.replies):
                return None
            said[row].append([*said[row][-1], *ids, *self.asks[turn - 1][row]])
            return Request(said[row][-1], row + turn, self.replies[turn][row], temperature)

        starts = [Request(p, row, self.replies[0][row], temperature) for row, p in enumerate(self.prompts)]
        made = decoder.run(starts, then)
        if decoder.graphs is not None and decoder.graphs.problem is not None:
            raise RuntimeError(decoder.graphs.problem)
        self.turns = [(m.num_kept, m.num_prompt, len(m.ids)) for row in made for m in row]
        return [[turn.ids for turn in row] for row in made]

    def theirs(self, model: PreTrainedModel, batch_size: int, temperature: float) -> list[list[list[int]]]:
        """Ids by row and turn, each turn a call a batch."""
        prompts: list[list[int]] = list(self.prompts)
        made: list[list[list[int]]] = [[] for _ in prompts]
        for turn, limits in enumerate(self.replies):
            if turn:
                prompts = self.follow(turn, prompts, [row[-1] for row in made])
            order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
            for begin in range(0, len(order), batch_size):
                unit = order[begin : begin + batch_size]
                out = plain_generate(model, [prompts[i] for i in unit], [limits[i] for i in unit], temperature)
                for i, ids in zip(unit, out, strict=True):
                    made[i].append(ids)
        return made


class Limits(StoppingCriteria):
    """A row is done once it has its number of tokens."""

    def __init__(self, start: int, limits: Sequence[int], device: torch.device) -> None:
        self.ends = start + torch.tensor(limits, device=device)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: object) -> torch.Tensor:
        return input_ids.shape[1] >= self.ends


def plain_generate(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], limits: Sequence[int], temperature: float
) -> list[list[int]]:
    """One call of ``generate`` for a left-padded batch."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
    out = model.generate(  # type: ignore[operator]
        ids.to(model.device),
        attention_mask=mask.to(model.device),
        max_new_tokens=max(limits),
        stopping_criteria=StoppingCriteriaList([Limits(longest, limits, model.device)]),
        eos_token_id=None,
        pad_token_id=0,
        **({"do_sample": False} | sampling),
    )
    return [row[longest : longest + n] for row, n in zip(out.tolist(), limits, strict=True)]


@dataclass(frozen=True)
class Called:
    """In a graph's place: the same steps, launched one kernel at a time."""

    replay: Callable[[], object]


class GenerationStage:
    """See the module."""

    name = "generation"

    def check(self, bench: Bench) -> list[Correctness]:
        """Greedy tokens of three turns: all equal in fp32; in bf16 most, since rounding decides between near ones."""
        num_rows, num_turns = CHECKED[bench.cuda]
        rows = Conversations(bench, num_rows, num_turns)
        own, plain = models(bench)
        ours, theirs = rows.ours(own, 5, 0.0), rows.theirs(plain, num_rows if bench.cuda else 4, 0.0)
        if not bench.cuda:
            whole = [(a, b) for mine, other in zip(ours, theirs, strict=True) for a, b in zip(mine, other, strict=True)]
            wrong = sum(a != b for a, b in whole) / len(whole)
            return [Correctness("share of turns whose greedy tokens are not generate's", wrong, 0.0)]
        wrong = sum(mine[0][:8] != other[0][:8] for mine, other in zip(ours, theirs, strict=True)) / len(ours)
        del own, plain
        found = [Correctness("share of first turns whose first 8 greedy tokens are not generate's", wrong, 0.25)]
        backends = [name for name in available(bench) if name in (*CUDA_ONLY, "sdpa")]
        rows = Conversations(bench, num_rows, 1)
        return [*found, *(replayed(bench, rows, IMPLEMENTATIONS[name]) for name in backends)]

    def time(self, bench: Bench) -> Iterator[Row]:
        """One turn and three, with some numbers of slots, and the peer's best batch size for one turn."""
        own, plain = models(bench)
        capture = None if graphs_over(own.config._attn_implementation) in bench.wrong else capture_cuda
        size = 0
        for num_turns, name, share in ((1, "one turn", 0.25), (TURNS, "CAI's three turns", 0.75)):
            rows = Conversations(bench, ROWS[bench.cuda], num_turns)
            size = size or tuned(bench, rows, plain)
            # Three turns take half a minute a repeat: one number of slots alone is timed.
            all_slots = OURS[bench.cuda][:1] if num_turns > 1 else sorted(set(OURS[bench.cuda]))
            calls: dict[str, Callable[[], object]] = {
                str(slots): partial(rows.ours, own, slots, 1.0, capture) for slots in all_slots
            }
            if bench.cuda:  # kernels are set up; the peer's were when it was tuned
                for call in calls.values():
                    call()
            calls["peer"] = partial(rows.theirs, plain, size, 1.0)
            times = take_turns(
                calls,
                bench.device,
                repeats=bench.repeats,
                warmups=0,
                budget_s=share * bench.budget_s,
                least=LEAST[bench.cuda],
            )
            for slots in all_slots:
                ours = percentiles(times[str(slots)])
                floor_s, words = floor(bench, own, rows.turns, rows.least_passes(slots))
                yield Row(
                    stage=self.name,
                    name=f"{name}, {slots} slots{SAID.get(slots, '')}",
                    dtype=bench.dtype_name,
                    shapes={
                        "rows": len(rows.prompts),
                        "turns": num_turns,
                        "slots": slots,
                        "reply_mean": rows.num_tokens / len(rows.prompts) / num_turns,
                        "model": bench.size.name,
                    },
                    seconds=ours,
                    repeats=len(times[str(slots)]),
                    peer=f"generate, batches of {size} (the best of {', '.join(map(str, BATCHES[bench.cuda]))})",
                    peer_seconds=percentiles(times["peer"]),
                    figures={
                        "tokens_per_s": rows.num_tokens / ours.p50,
                        "peer_tokens_per_s": rows.num_tokens / percentiles(times["peer"]).p50,
                    },
                    target=_target(bench, slots),
                    floor_s=floor_s,
                    floor=words,
                    note="LoRA r 32 on q and v, not merged, on both sides",
                )


def models(bench: Bench) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Ours and the peer's, with equal weights and LoRA."""
    model, adapter = bench.adapted()
    peer = PeerModel(bench, adapter.slots)
    peer.load(adapter.values)
    return inner(model), inner(peer.model)


def inner(model: PeftModel) -> PreTrainedModel:
    """The Hugging Face model, with LoRA in its layers."""
    base = model.eval().get_base_model()
    assert isinstance(base, PreTrainedModel)
    return base


def replayed(bench: Bench, rows: Conversations, implementation: str) -> Correctness:
    """Greedy tokens from graphs over one attention backend, against the same steps without; a break-off fails.

    Both with torch's deterministic algorithms, under which exact mode decodes, and without.
    """
    part = graphs_over(implementation)
    what, moved = f"{part}: share of rows whose replayed tokens are not the eager ones", math.nan
    model = inner(bench.adapted(attention=implementation)[0])
    try:
        shares = []
        for on in (False, True):
            with deterministic(on):
                graphs, eager = rows.ours(model, 5, 0.0), rows.ours(model, 5, 0.0, capture=Called)
            shares.append(sum(a != b for a, b in zip(graphs, eager, strict=True)) / len(eager))
        moved = max(shares)
    except RuntimeError as error:
        what += f" ({type(error).__name__}: {next(iter(str(error).splitlines()), '')})"
    del model
    give_memory_back(bench.device)
    return Correctness(what, moved, 0.0, part=part)


def graphs_over(implementation: str) -> str:
    """What graphs over an attention implementation of transformers' are called: "graphs over varlen"."""
    names = {own: name for name, own in IMPLEMENTATIONS.items()}
    return f"graphs over {names.get(implementation, implementation)}"


def tuned(bench: Bench, rows: Conversations, model: PreTrainedModel) -> int:
    """The peer's batch size with the most tokens a second, of one call each with a quarter of the rows.

    A larger batch gets as many rows as fill it.
    """
    speed = {}
    for size in BATCHES[bench.cuda]:
        some = rows.thinned(max(size, len(rows.prompts) // 4))
        speed[size] = some.num_tokens / seconds_of(partial(some.theirs, model, size, 1.0), bench.device)
    return max(speed, key=lambda size: speed[size])


def floor(
    bench: Bench, model: PreTrainedModel, turns: Sequence[tuple[int, int, int]], passes: int
) -> tuple[float, str]:
    """Seconds that the device's peak allows for the turns, and the formula."""
    effort, peak = ModelCost.of(model).forward(decode_work(turns, passes)), bench.peak()
    seconds = max(effort.flops / peak.flops, effort.num_bytes / peak.bytes_per_s)
    return seconds, (
        f"the larger of {effort.flops:.3g} FLOP at {peak.flops:.3g} FLOP/s and {effort.num_bytes:.3g} bytes (weights "
        f"once a pass, kept keys and values) at {peak.bytes_per_s:.3g} bytes/s ({peak.source})"
    )


def _target(bench: Bench, slots: int) -> Target | None:
    if bench.cuda:
        return Target("tokens_per_s", 20_000.0) if slots == 256 else None
    return Target("ratio", 2.0) if slots == EvalConfig.batch_size else None


STAGE = GenerationStage()
