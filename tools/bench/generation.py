"""Generation: one turn and CAI's three, beside Hugging Face's ``generate`` with its batch size tuned.

Every row gets exactly the reply length that SQuARe's histogram draws for it, on both sides: ours by the row's limit,
theirs by a stopping criterion per row. Both see the rows sorted by the length of their prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from transformers import PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from fedsim.config.measuring import EvalConfig
from fedsim.generate.decode import Decoder, Request
from fedsim.generate.engine import CUDA_BLOCK
from fedsim.generate.graph import Capture, Graphs, capture_cuda
from fedsim.model.cost import ModelCost, decode_work
from tools.bench.lengths import draw, random_ids
from tools.bench.measure import percentiles, seconds_of, take_turns
from tools.bench.rows import Correctness, Row, Target
from tools.bench.stage import Bench

BATCHES = {False: (1, 4, 8, 16, 32, 64), True: (16, 32, 64, 128, 256)}  # of theirs, by whether CUDA
OURS = {False: (EvalConfig.batch_size, 16, 32), True: (EvalConfig.batch_size, 256)}
ROWS = {False: 64, True: 512}
TURNS = 3
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

    def follow(self, turn: int, prompts: Sequence[Sequence[int]], made: Sequence[Sequence[int]]) -> list[list[int]]:
        """Prompts of ``turn``: the last one's, what was replied, and the next question."""
        return [[*p, *m, *ask] for p, m, ask in zip(prompts, made, self.asks[turn - 1], strict=True)]

    def ours(
        self, model: PreTrainedModel, num_slots: int, temperature: float, capture: Capture = capture_cuda
    ) -> tuple[list[list[list[int]]], Decoder]:
        """Ids by row and turn; ``capture`` is of use on CUDA."""
        decoder = Decoder(
            model,
            num_slots,
            max_new_tokens=max(map(max, self.replies)),
            temperature=temperature,
            eos_ids=frozenset(),
            graphs=Graphs(capture) if self.bench.cuda else None,
            block=CUDA_BLOCK if self.bench.cuda else 1,
        )
        said: list[list[list[int]]] = [[prompt] for prompt in self.prompts]

        def then(row: int, ids: list[int]) -> Request | None:
            turn = len(said[row])
            if turn == len(self.replies):
                return None
            said[row].append([*said[row][-1], *ids, *self.asks[turn - 1][row]])
            return Request(said[row][-1], row + turn, self.replies[turn][row])

        starts = [Request(p, row, self.replies[0][row]) for row, p in enumerate(self.prompts)]
        made = decoder.run(starts, then)
        self.turns = [(m.num_kept, m.num_prompt, len(m.ids)) for row in made for m in row]
        return [[turn.ids for turn in row] for row in made], decoder

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


class _Limits(StoppingCriteria):
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
        stopping_criteria=StoppingCriteriaList([_Limits(longest, limits, model.device)]),
        eos_token_id=None,
        pad_token_id=0,
        **({"do_sample": False} | sampling),
    )
    return [row[longest : longest + n] for row, n in zip(out.tolist(), limits, strict=True)]


@dataclass(frozen=True)
class _Called:
    """In a graph's place: the same steps, launched one kernel at a time."""

    replay: Callable[[], None]


class GenerationStage:
    """See the module."""

    name = "generation"

    def check(self, bench: Bench) -> list[Correctness]:
        """Greedy tokens of three turns: all equal in fp32; in bf16 most, since rounding decides between near ones."""
        rows = Conversations(bench, 12, TURNS)
        ours, _ = rows.ours(bench.base(), 5, 0.0)
        theirs = rows.theirs(bench.base("sdpa"), 4, 0.0)
        whole = [(a, b) for mine, other in zip(ours, theirs, strict=True) for a, b in zip(mine, other, strict=True)]
        if not bench.cuda:
            wrong = sum(a != b for a, b in whole) / len(whole)
            return [Correctness("share of turns whose greedy tokens are not generate's", wrong, 0.0)]
        wrong = sum(a[:8] != b[:8] for a, b in whole[::TURNS]) / len(ours)
        eager, _ = rows.ours(bench.base(), 5, 0.0, capture=_Called)
        moved = sum(a != b for a, b in zip(ours, eager, strict=True)) / len(ours)
        return [
            Correctness("share of first turns whose first 8 greedy tokens are not generate's", wrong, 0.25),
            Correctness(
                "share of rows whose replayed tokens are not the eager ones", moved, 0.0, proves="decode_graph"
            ),
        ]

    def time(self, bench: Bench) -> list[Row]:
        """One turn and three, with the peer's best batch size and some of ours."""
        own, plain = bench.base(), bench.base("sdpa")
        found = []
        for num_turns, name in ((1, "one turn"), (TURNS, "CAI's three turns")):
            rows = Conversations(bench, ROWS[bench.cuda], num_turns)
            best = tuned(bench, [partial(rows.theirs, plain, size, 1.0) for size in BATCHES[bench.cuda]])
            size = BATCHES[bench.cuda][best]
            calls: dict[str, Callable[[], object]] = {
                str(n): partial(rows.ours, own, n, 1.0) for n in sorted(set(OURS[bench.cuda]))
            }
            calls["peer"] = partial(rows.theirs, plain, size, 1.0)
            times = take_turns(
                calls, bench.device, repeats=bench.repeats, warmups=1 if bench.cuda else 0, budget_s=bench.budget_s
            )
            for slots in sorted(set(OURS[bench.cuda])):
                ours = percentiles(times[str(slots)])
                _, decoder = rows.ours(own, slots, 1.0)
                floor_s, words = floor(bench, own, rows.turns, decoder.passes)
                found.append(
                    Row(
                        stage=self.name,
                        name=f"{name}, {slots} slots" + (" (default)" if slots == EvalConfig.batch_size else ""),
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
                    )
                )
        return found


def tuned(bench: Bench, calls: Sequence[Callable[[], object]]) -> int:
    """Which call is fastest, of two turns each."""
    times = [[seconds_of(call, bench.device) for call in calls] for _ in range(2)]
    best = [min(pair) for pair in zip(*times, strict=True)]
    return best.index(min(best))


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
