"""Measure the bundled adapters on held-out prompts, and the base model on the same prompts without them.

    python -m examples.evaluate                     # a table; exit status 1 when one falls short
    python -m examples.evaluate --prompt "Anna sold two lovely lamps in Oslo on Monday."

Answers are greedy, in float32, by transformers and PEFT; a right answer is right to the letter.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from peft import PeftModel
from safetensors import safe_open
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from examples import training
from examples.tasks import JOBS, chat_prompt

BASE_LIMIT = 0.20  # the base model alone must stay below this on every job


def parameters_of(folder: Path) -> int:
    with safe_open(folder / "adapter_model.safetensors", "pt") as tensors:
        shapes = [tensors.get_slice(name).get_shape() for name in tensors.keys()]  # noqa: SIM118 (not a dict)
    return sum(rows * columns for rows, columns in shapes)


def table(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, adapters: Path, count: int, seed: int
) -> tuple[list[str], bool]:
    """One line for each adapter, and whether all of them pass."""
    lines = [f"{'adapter':12}{'rank':>6}{'targets':>9}{'weights':>10}{'with it':>10}{'without':>10}"]
    passed = True
    for name, job in JOBS.items():
        heldout = job.examples("heldout", count, seed)
        model.set_adapter(name)
        score = training.exact_match(model, tokenizer, heldout, job.formats)
        with model.disable_adapter():
            base_score = training.exact_match(model, tokenizer, heldout, job.formats)
        passed = passed and score >= training.GOOD_ENOUGH and base_score < BASE_LIMIT
        config = json.loads((adapters / name / "adapter_config.json").read_text(encoding="utf-8"))
        ranks = sorted({config["r"], *config["rank_pattern"].values()})
        lines.append(
            f"{name:12}{'-'.join(map(str, ranks)):>6}{len(config['target_modules']):>9}"
            f"{parameters_of(adapters / name):>10,}{score:>10.1%}{base_score:>10.1%}"
        )
    return lines, passed


def one_prompt(model: PeftModel, tokenizer: PreTrainedTokenizerBase, text: str) -> list[str]:
    """What the base model and every adapter answer to the same chat message."""
    prompts = [chat_prompt(text)]
    with model.disable_adapter():
        lines = [f"{'(base)':12}{training.answers(model, tokenizer, prompts)[0]}"]
    for name in JOBS:
        model.set_adapter(name)
        lines.append(f"{name:12}{training.answers(model, tokenizer, prompts)[0]}")
    return lines


def with_adapters(base: PreTrainedModel, adapters: Path) -> PeftModel:
    first, *others = JOBS
    model = PeftModel.from_pretrained(base, adapters / first, adapter_name=first)
    for name in others:
        model.load_adapter(adapters / name, adapter_name=name)
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--base", type=Path, default=training.BASE_MODEL)
    parser.add_argument("--adapters", type=Path, default=training.ADAPTERS)
    parser.add_argument("--count", type=int, default=200, help="held-out examples of each job")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--prompt", help="print everyone's answer to this one message instead")
    args = parser.parse_args()

    base, tokenizer = training.load_base(args.base)
    model = with_adapters(base, args.adapters)
    if args.prompt:
        print("\n".join(one_prompt(model, tokenizer, args.prompt)))
        return
    lines, passed = table(model, tokenizer, args.adapters, args.count, args.seed)
    print("\n".join(lines))
    raise SystemExit(0 if passed else 1)


if __name__ == "__main__":
    main()
