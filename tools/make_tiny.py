"""Train the embedded tiny model from scratch, measure its skills and write the model directory with its record.

Usage: python tools/make_tiny.py [--out DIR] [--seed N] [--steps-scale X | --quick] [--data DIR]
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

from fedsim import world
from fedsim.base.terminal import steady_terminal
from fedsim.evaluate import over_refusal
from fedsim.world.tiny_model import TINY_DIR
from fedsim.world.tiny_recipe import Recipe, save_model, train
from fedsim.world.tiny_skills import measure_skills

QUICK_SCALE = 0.05


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Command-line arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=TINY_DIR, help="model directory to write (default: the shipped one)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and conversations (default 0)")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps-scale", type=float, default=1.0, help="factor on the steps of both stages (default 1)")
    length.add_argument("--quick", action="store_true", help=f"the same as --steps-scale {QUICK_SCALE}")
    parser.add_argument(
        "--data", type=Path, help="only write the world's data files into this directory, train nothing"
    )
    args = parser.parse_args(argv)
    if args.steps_scale <= 0:
        parser.error(f"--steps-scale={args.steps_scale}: must be positive; 1 is the full recipe")
    return args


def write_data(directory: Path) -> None:
    """All files of the world, for a look or for other tools."""
    directory.mkdir(parents=True, exist_ok=True)
    world.write_square(directory / "square.json")
    world.write_advbench(directory / "advbench.csv")
    world.write_hhh(directory / "hhh.jsonl")
    world.write_mt_bench(directory / "mt_bench")
    over_refusal.write_xstest(directory / "xstest.csv")
    world.write_helpful(directory / "helpful.jsonl")


@steady_terminal()
def main(argv: list[str] | None = None) -> int:
    """Run the tool; returns the exit status."""
    args = parse_args(argv)
    if args.data:
        write_data(args.data)
        names = "square.json, advbench.csv, hhh.jsonl, mt_bench/question.jsonl, xstest.csv and helpful.jsonl"
        print(f"wrote {names} to {args.data}")
        return 0
    recipe = Recipe(seed=args.seed, steps_scale=QUICK_SCALE if args.quick else args.steps_scale)
    start = time.process_time()  # one thread computes: CPU time is the time on an idle core

    def report(stage: str, step: int, loss: float) -> None:
        if step % 50 == 0:
            print(f"{time.process_time() - start:6.1f} s  {stage} step {step}: loss {loss:.3f}", flush=True)

    model, tokenizer, losses = train(recipe, report)
    seconds = time.process_time() - start
    torch.set_num_threads(1)
    skills = measure_skills(model, tokenizer)
    for name, skill in skills.items():
        print(f"{name}: {skill.right}/{skill.count} = {skill.rate:.1%} ({skill.baseline_name}: {skill.baseline:.1%})")
    save_model(args.out, model, tokenizer, recipe, losses, skills, seconds)
    print(f"wrote {args.out}: {seconds:.0f} s of training, {time.process_time() - start - seconds:.0f} s of measuring")
    return 0


if __name__ == "__main__":
    sys.exit(main())
