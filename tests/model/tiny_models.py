"""Tiny random models of many architectures, with PEFT adapters, and what transformers + PEFT generate."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from server.engine.engine import Engine
from tests.engine.harness import adapter_ref, greedy, run, tokens_of

VOCAB = 211
_SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": 12},
    "gemma2": {"sliding_window": 12, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8},
    "gemma3_text": {"sliding_window": 12, "layer_types": ["sliding_attention", "full_attention"]},
    "phi3": {"intermediate_size": 64},  # packed gate and up are compiled in whole panels of 32
    "granite": {"attention_multiplier": 0.3, "residual_multiplier": 0.7, "logits_scaling": 2.0},
    "olmo2": {},
    "smollm3": {"no_rope_layers": [1, 0]},
    "gpt_oss": {
        "sliding_window": 12,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "layer_types": ["sliding_attention", "full_attention"],
    },
}
# Names of the Linear modules to adapt, where they are not Llama's.
_TARGETS: dict[str, list[str]] = {
    "phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
    "gpt_oss": ["q_proj", "k_proj", "v_proj", "o_proj"],
}
_LLAMA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def build(architecture: str, folder: Path, **overrides: Any) -> Path:
    """Write a tiny random model of this architecture in float32; weights large enough for clear argmaxes."""
    config = AutoConfig.for_model(architecture, **(_SMALL | ARCHITECTURES[architecture] | overrides))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 or "sinks" in name:
                parameter.normal_(0, 0.25)
    model.save_pretrained(folder)
    return folder


def targets_of(architecture: str) -> list[str]:
    return _TARGETS.get(architecture, _LLAMA_TARGETS)


def add_adapter(model_folder: Path, out: Path, *, seed: int, rank: int, **options: Any) -> Path:
    """A PEFT adapter with random A and B on a model written by `build`."""
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    torch.manual_seed(seed)
    peft = get_peft_model(model, LoraConfig(r=rank, task_type="CAUSAL_LM", **({"lora_alpha": 8} | options)))
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.15)
    peft.save_pretrained(out, save_embedding_layers=False)
    return out


@dataclass(frozen=True)
class Job:
    """One request: a prompt, an adapter folder (None = base model) and how many tokens to generate."""

    prompt: list[int]
    adapter: Path | None
    tokens: int


def oracle(model_folder: Path, adapter: Path | None) -> nn.Module:
    """transformers + PEFT in float32. Attention is eager: under sdpa transformers 5.17 drops the softcap."""
    model: nn.Module = AutoModelForCausalLM.from_pretrained(
        model_folder, dtype=torch.float32, attn_implementation="eager"
    )
    return (model if adapter is None else PeftModel.from_pretrained(model, str(adapter))).eval()


@torch.inference_mode()
def expected(model_folder: Path, jobs: list[Job]) -> list[list[int]]:
    """Greedy tokens of the oracle, each request alone and without a cache."""
    results = []
    for job in jobs:
        model = oracle(model_folder, job.adapter)
        ids = list(job.prompt)
        for _ in range(job.tokens):
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        results.append(ids[len(job.prompt) :])
    return results


def serve(engine: Engine, jobs: list[Job]) -> list[list[int]]:
    """The tokens that an engine generates for them, all at once."""
    for i, job in enumerate(jobs):
        refs = [adapter_ref(job.adapter)] if job.adapter else []
        engine.add(greedy(str(i), job.prompt, job.tokens, refs))
    outputs = run(engine)
    return [tokens_of(outputs[str(i)]) for i in range(len(jobs))]
