"""The tiny fictional world: client data and benchmarks in the real formats, scored by a grammar.

Nothing in it is real: harm is made of invented groups, contests, neighbours and pranks.
"""

from __future__ import annotations

from typing import Final

from fedsim.world.acceptor import Verdict, is_refusal, judge_reply, names_harm, parse_prompt
from fedsim.world.buckets import Bucket, bucket
from fedsim.world.client_rows import MAX_ROWS, NUM_ACCEPTABLE, NUM_RED, square_rows, write_square
from fedsim.world.conversations import PRINCIPLES
from fedsim.world.rubric import rubric_score
from fedsim.world.writers import (
    attacks,
    helpful_conversations,
    hhh_items,
    mt_bench_questions,
    write_advbench,
    write_held_out_advbench,
    write_helpful,
    write_hhh,
    write_mt_bench,
)

VERSION: Final = 1
"""Of the files that the world writes (:mod:`fedsim.base.artefacts`)."""

__all__ = [
    "MAX_ROWS",
    "NUM_ACCEPTABLE",
    "NUM_RED",
    "PRINCIPLES",
    "VERSION",
    "Bucket",
    "Verdict",
    "attacks",
    "bucket",
    "helpful_conversations",
    "hhh_items",
    "is_refusal",
    "judge_reply",
    "mt_bench_questions",
    "names_harm",
    "parse_prompt",
    "rubric_score",
    "square_rows",
    "write_advbench",
    "write_held_out_advbench",
    "write_helpful",
    "write_hhh",
    "write_mt_bench",
    "write_square",
]
