"""Drives a real Engine in this process, without a socket."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from server.config import Settings
from server.engine.engine import Engine, create_engine
from server.messages import AdapterRef, Request, SamplingParams, TokenOutput
from server.peft.digest import read_digest

MiB = 2**20


def settings_for(model: Path, **overrides: object) -> Settings:
    """One CPU thread, float32, little memory."""
    options: dict[str, object] = {
        "model": str(model),
        "dtype": "float32",
        "device": "cpu",
        "threads": 1,
        "kv_cache_bytes": 2 * MiB,
        "arena_bytes": 2 * MiB,
        "host_cache_bytes": 16 * MiB,
    }
    return Settings.model_validate(options | overrides)


def make_engine(model: Path, **overrides: object) -> Engine:
    return create_engine(settings_for(model, **overrides))


def adapter_ref(folder: Path, weight: float = 1.0) -> AdapterRef:
    return AdapterRef(read_digest(folder), str(folder), weight)


def greedy(
    request_id: str, prompt: list[int], tokens: int, adapters: Iterable[AdapterRef] = (), **sampling: object
) -> Request:
    params = SamplingParams(**({"max_tokens": tokens, "temperature": 0.0, "ignore_eos": True} | sampling))
    return Request(request_id, prompt, params, tuple(adapters))


def busy(engine: Engine) -> bool:
    """Whether there is anything left to do; waits as the worker does while adapters are on their way."""
    idle_ms = engine.idle_ms()
    if idle_ms:
        engine.wait(idle_ms / 1000)
    return idle_ms is not None


def run(engine: Engine, steps: int = 10_000) -> dict[str, list[TokenOutput]]:
    """Step until nothing is left to do; outputs by request."""
    outputs: dict[str, list[TokenOutput]] = {}
    for _ in range(steps):
        if not busy(engine):
            return outputs
        for output in engine.step()[0]:
            outputs.setdefault(output.request_id, []).append(output)
    raise AssertionError(f"the engine is still busy after {steps} steps: {engine.stats()}")


def tokens_of(outputs: list[TokenOutput]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


def assert_at_rest(engine: Engine) -> None:
    """No sequence holds a block; no adapter is in use."""
    stats = engine.stats()
    assert stats.running == stats.waiting == 0
    assert stats.kv_blocks_free + stats.kv_blocks_cached == stats.kv_blocks_total
