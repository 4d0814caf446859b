"""Train a LoRA adapter with PEFT on a frozen base model, measure it and save it as the server reads it."""

from __future__ import annotations

import json
import random
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from examples.tasks import PROMPT_FORMATS, Example, PromptFormat

# peft 0.21 asks transformers 5.23 for a property by its old name
warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)

REPOSITORY = Path(__file__).resolve().parents[1]
BASE_MODEL = REPOSITORY / "models" / "chorus-tiny"
ADAPTERS = REPOSITORY / "adapters"

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")

GOOD_ENOUGH = 0.95  # held-out exact match that a bundled adapter must reach

_NO_LOSS = -100  # the label that cross entropy leaves out

# Products of bfloat16 are twice as fast as float32's where the processor has them, and far slower elsewhere.
HAS_BFLOAT16 = any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def load_base(path: Path = BASE_MODEL) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The base model in float32, and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(path)


def lora_config(rank: int, targets: Sequence[str], alpha: int | None = None, **options: Any) -> LoraConfig:
    """A LoRA for causal language models; `alpha` is twice the rank unless given."""
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=2 * rank if alpha is None else alpha,
        target_modules=list(targets),
        **options,
    )


def train_adapter(
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    config: LoraConfig,
    *,
    steps: int,
    batch_size: int = 32,
    learning_rate: float = 3e-3,
    seed: int = 0,
    formats: Sequence[PromptFormat] = PROMPT_FORMATS,
    report: Callable[[str], None] = print,
) -> PeftModel:
    """Wrap `base` with a fresh adapter and train that; as many examples in each prompt format.

    The base's weights stay as they are; `PeftModel.unload` gives the bare base back.
    """
    torch.manual_seed(seed)
    model = get_peft_model(base, config)
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)
    rows = [
        encode(tokenizer, formats[i % len(formats)](example.prompt), example.completion)
        for i, example in enumerate(examples)
    ]
    report(f"{sum(p.numel() for p in weights):,} weights to train on {len(rows)} examples")
    model.train()
    started, loss_sum = time.monotonic(), 0.0
    for step, batch in zip(range(1, steps + 1), _batches(rows, batch_size, seed), strict=False):
        with torch.autocast("cpu", torch.bfloat16, enabled=HAS_BFLOAT16):
            loss = model(**collate(batch, tokenizer.pad_token_id)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        loss_sum += loss.item()
        if step % 50 == 0 or step == steps:
            since = (step - 1) % 50 + 1
            report(f"step {step}/{steps}  loss {loss_sum / since:.4f}  {time.monotonic() - started:.0f} s")
            loss_sum = 0.0
    return model.eval()


def encode(tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str) -> tuple[list[int], list[int]]:
    """Token ids and labels of one example; only the completion and its end count in the loss."""
    prompt_ids = tokenizer(prompt)["input_ids"]
    completion_ids = [*tokenizer(completion)["input_ids"], tokenizer.eos_token_id]
    return prompt_ids + completion_ids, [_NO_LOSS] * len(prompt_ids) + completion_ids


def collate(rows: Sequence[tuple[list[int], list[int]]], pad_id: int) -> dict[str, torch.Tensor]:
    """Rows padded on the right: `input_ids`, `labels` and `attention_mask`, each [rows, tokens]."""
    width = max(len(ids) for ids, _ in rows)
    return {
        "input_ids": torch.tensor([ids + [pad_id] * (width - len(ids)) for ids, _ in rows]),
        "labels": torch.tensor([labels + [_NO_LOSS] * (width - len(labels)) for _, labels in rows]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in rows]),
    }


def _batches(rows: list[Any], size: int, seed: int) -> Iterator[list[Any]]:
    rng = random.Random(seed)
    while True:
        yield rng.sample(rows, min(size, len(rows)))


@torch.inference_mode()
def answers(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 64,
    batch_size: int = 64,
) -> list[str]:
    """Greedy answers to rendered prompts, without the end token."""
    texts: list[str] = []
    for start in range(0, len(prompts), batch_size):
        batch = tokenizer(
            list(prompts[start : start + batch_size]),
            padding=True,
            padding_side="left",
            return_tensors="pt",
            return_token_type_ids=False,
        )
        output = model.generate(**batch, do_sample=False, max_new_tokens=max_new_tokens)
        new_tokens = output[:, batch["input_ids"].shape[1] :]  # [rows, generated]
        texts.extend(tokenizer.batch_decode(new_tokens, skip_special_tokens=True))
    return texts


def exact_match(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    formats: Sequence[PromptFormat] = PROMPT_FORMATS,
) -> float:
    """The share of greedy answers that are right to the letter, over every example in every prompt format."""
    prompts = [wrap(example.prompt) for wrap in formats for example in examples]
    wanted = [example.completion for _ in formats for example in examples]
    longest = max(len(tokenizer(completion)["input_ids"]) for completion in wanted)
    got = answers(model, tokenizer, prompts, max_new_tokens=longest + 2)
    return sum(a == b for a, b in zip(got, wanted, strict=True)) / len(wanted)


def save_adapter(model: PeftModel, out: Path, base_path: Path, card: str) -> None:
    """Plain PEFT layout and our own card; the base is named by its folder, never by this machine's path."""
    model.peft_config["default"].base_model_name_or_path = f"models/{base_path.name}"
    # the embeddings never change here; PEFT's own check of that would ask the hub about the base
    model.save_pretrained(out, save_embedding_layers=False)
    (out / "README.md").write_text(card, encoding="utf-8")
    _tidy(out)


def _tidy(folder: Path) -> None:
    """The same bytes on every run (PEFT writes a set in any order), and readable by a server's own user."""
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["target_modules"].sort()
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    for file in folder.iterdir():
        file.chmod(0o644)
