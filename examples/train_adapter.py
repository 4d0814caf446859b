"""Train a new adapter on the bundled model and see how to serve it: about a minute on two cores.

    python -m examples.train_adapter --out /tmp/quiz
    python -m examples.train_adapter --out /tmp/mine --data pairs.jsonl

Without `--data` it teaches a job that no bundled adapter does (`NEW_JOB` in `examples/tasks.py`). With it,
one JSON object a line: {"prompt": "...", "completion": "..."}; about one pair in ten is held out.
"""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path

from examples import training
from examples.tasks import NEW_JOB, Example, completion_prompt, split_of

CARD = """\
# {name}

A LoRA adapter for `{base}`, made by `python -m examples.train_adapter`.

Rank {rank}; exact match on held-out examples: {score}.

For example `{prompt}` gives `{completion}`.
"""


def read_pairs(path: Path) -> list[Example]:
    """Raises ValueError with the line number of a line that is not a prompt and a completion."""
    examples = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            pair = json.loads(line)
            examples.append(Example(str(pair["prompt"]), str(pair["completion"])))
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(
                f'{path.name}, line {number}: want {{"prompt": ..., "completion": ...}}'
            ) from error
    return examples


def load_examples(data: Path | None, seed: int) -> tuple[list[Example], list[Example]]:
    """Examples to train on, and examples held out to measure with."""
    if data is None:
        return NEW_JOB.examples("train", 3000, seed), NEW_JOB.examples("heldout", 100, seed)
    pairs = read_pairs(data)
    train = [pair for pair in pairs if split_of(pair.prompt) == "train"]
    return train, [pair for pair in pairs if split_of(pair.prompt) == "heldout"]


def curl_commands(server: str, name: str, out: Path, prompt: str) -> str:
    """Upload, call in both ways, replace and delete, ready to paste into a shell."""
    quoted = shlex.quote(str(out))
    files = f"  -F files=@{quoted}/adapter_config.json \\\n  -F files=@{quoted}/adapter_model.safetensors"
    chat = json.dumps({"model": name, "messages": [{"role": "user", "content": prompt}], "temperature": 0})
    completion = json.dumps({"model": name, "prompt": completion_prompt(prompt), "temperature": 0})
    as_json = "-H 'content-type: application/json' -d"
    return f"""\
# upload it to a running server (`make serve`)
curl {server}/v1/adapters -F name={name} \\
{files}

# call it
curl {server}/v1/chat/completions {as_json} {shlex.quote(chat)}
curl {server}/v1/completions {as_json} {shlex.quote(completion)}

# train again with other options, then replace it: running requests finish on the old version
curl -X PUT {server}/v1/adapters/{name} \\
{files}

# delete it
curl -X DELETE {server}/v1/adapters/{name}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write the adapter to")
    parser.add_argument("--name", help="its name on the server; the folder's name unless given")
    parser.add_argument("--data", type=Path, help="your own prompt and completion pairs, JSON lines")
    parser.add_argument("--base", type=Path, default=training.BASE_MODEL, help="folder of the base model")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="its peak")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--server", default="http://127.0.0.1:8000", help="for the printed commands")
    args = parser.parse_args()

    name = args.name or args.out.resolve().name
    train, heldout = load_examples(args.data, args.seed)
    if not train:
        parser.error("there is nothing to train on")
    base, tokenizer = training.load_base(args.base)
    model = training.train_adapter(
        base,
        tokenizer,
        train,
        training.lora_config(args.rank, [*training.ATTENTION, *training.MLP]),
        steps=args.steps,
        learning_rate=args.learning_rate,
        seed=args.seed,
    )
    score = (
        f"{training.exact_match(model, tokenizer, heldout):.1%} of {len(heldout)}"
        if heldout
        else "unmeasured"
    )
    print(f"held-out exact match: {score}")
    shown = (heldout or train)[0]
    card = CARD.format(
        name=name,
        base=f"models/{args.base.name}",
        rank=args.rank,
        score=score,
        prompt=shown.prompt,
        completion=shown.completion,
    )
    training.save_adapter(model, args.out, args.base, card)
    print(f"written to {args.out}\n")
    print(curl_commands(args.server, name, args.out, shown.prompt))


if __name__ == "__main__":
    main()
