"""Train the adapters that Chorus ships, one for each job, into adapters/.

    python -m examples.train_bundled_adapters              # all of them
    python -m examples.train_bundled_adapters --only sql

Their shapes differ on purpose: ranks 4 to 32, from two projections to all seven, rsLoRA, and ranks that
change from projection to projection.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig

from examples import training
from examples.tasks import JOBS, Job
from examples.training import ATTENTION, MLP, lora_config

CARD = """\
# {name}

LoRA adapter for the bundled model `{base}`. Its job: {description}.

| | |
|---|---|
| rank, alpha | {rank}, {alpha}{extras} |
| target modules | {targets} |
| held-out exact match | {score:.1%} of {count} prompts in {formats} (greedy, float32) |
| the same without the adapter | {base_score:.1%} |
| made by | `python -m examples.train_bundled_adapters --only {name} --seed {seed}` |
| took | {steps} steps, {seconds:.0f} s on {threads} CPU threads |

For example `{prompt}` gives `{completion}`.
"""


@dataclass(frozen=True)
class Recipe:
    config: LoraConfig
    steps: int


def recipes() -> dict[str, Recipe]:
    """Fresh ones on each call, because PEFT writes into the config that it is given."""
    return {
        "sentiment": Recipe(lora_config(4, ["q_proj", "v_proj"]), steps=500),
        "upper": Recipe(lora_config(8, ["q_proj", "v_proj", "o_proj"]), steps=400),
        "json": Recipe(lora_config(8, ATTENTION), steps=400),
        "reverse": Recipe(
            lora_config(
                8,
                [*ATTENTION, *MLP],
                rank_pattern={"q_proj": 16, "k_proj": 16},
                alpha_pattern={"q_proj": 32, "k_proj": 32},
            ),
            steps=1600,
        ),
        "esperanto": Recipe(lora_config(16, [*ATTENTION, "down_proj"], alpha=8, use_rslora=True), steps=400),
        "sql": Recipe(lora_config(16, [*ATTENTION, *MLP]), steps=800),
        "sort": Recipe(lora_config(32, [*ATTENTION, *MLP]), steps=900),
    }


def train_one(job: Job, recipe: Recipe, base_path: Path, out: Path, seed: int, heldout: int = 200) -> float:
    """Train one adapter, measure it on `heldout` examples and save it; returns its exact match."""
    base, tokenizer = training.load_base(base_path)
    unseen = job.examples("heldout", heldout, seed)
    base_score = training.exact_match(base, tokenizer, unseen, job.formats)
    started = time.monotonic()
    model = training.train_adapter(
        base,
        tokenizer,
        job.examples("train", 6000, seed),
        recipe.config,
        steps=recipe.steps,
        seed=seed,
        formats=job.formats,
    )
    seconds = time.monotonic() - started
    score = training.exact_match(model, tokenizer, unseen, job.formats)
    print(f"{job.name}: {score:.1%} right with it, {base_score:.1%} without it, {seconds:.0f} s", flush=True)
    config = recipe.config
    patterns = [f"; {key}: {rank}" for key, rank in config.rank_pattern.items()]
    card = CARD.format(
        name=job.name,
        base=f"models/{base_path.name}",
        description=job.description,
        rank=config.r,
        alpha=config.lora_alpha,
        extras="".join(patterns) + ("; rsLoRA" if config.use_rslora else ""),
        targets=", ".join(sorted(config.target_modules)),
        score=score,
        base_score=base_score,
        count=len(unseen),
        formats="both prompt formats" if len(job.formats) > 1 else "its prompt format",
        seed=seed,
        steps=recipe.steps,
        seconds=seconds,
        threads=torch.get_num_threads(),
        prompt=unseen[0].prompt,
        completion=unseen[0].completion,
    )
    training.save_adapter(model, out, base_path, card)
    return score


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=sorted(JOBS), default=list(JOBS), metavar="JOB")
    parser.add_argument("--base", type=Path, default=training.BASE_MODEL, help="folder of the base model")
    parser.add_argument("--out", type=Path, default=training.ADAPTERS, help="gets one folder for each job")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    all_recipes = recipes()
    started = time.monotonic()
    scores = {
        name: train_one(JOBS[name], all_recipes[name], args.base, args.out / name, args.seed)
        for name in args.only
    }
    print(f"\n{len(scores)} adapters in {(time.monotonic() - started) / 60:.1f} minutes")
    if weak := [name for name, score in scores.items() if score < training.GOOD_ENOUGH]:
        raise SystemExit(f"below {training.GOOD_ENOUGH:.0%}: {', '.join(weak)}")


if __name__ == "__main__":
    main()
