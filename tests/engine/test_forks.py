"""Choices of one request in a whole engine: the tokens of separate requests, from one prompt's K and V."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from server.messages import Fork, Request
from tests.engine.harness import adapter_ref, assert_at_rest, greedy, make_engine, run, tokens_of
from tests.model.tiny_models import add_adapter, build, targets_of

PROMPT = [3 + 7 * i % 200 for i in range(83)]  # five blocks of 16, and three tokens


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("forks")
    model = build("llama", root / "model")
    return model, add_adapter(model, root / "a", seed=1, rank=4, target_modules=targets_of("llama"))


def sampled(name: str, seed: int, adapter: Path | None) -> Request:
    refs = [adapter_ref(adapter)] if adapter else []
    return greedy(name, PROMPT, 12, refs, temperature=1.5, seed=seed)


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("max_num_seqs", [3, 16])
def test_choices_get_the_tokens_of_separate_requests(
    folders: tuple[Path, Path], adapted: bool, max_num_seqs: int
) -> None:
    model, adapter = folders[0], folders[1] if adapted else None
    engine = make_engine(model, max_num_seqs=max_num_seqs, max_num_batched_tokens=32, prefix_caching=False)
    for k in range(8):
        engine.add(sampled(f"alone-{k}", k, adapter))
    outputs = run(engine)
    alone = [tokens_of(outputs[f"alone-{k}"]) for k in range(8)]
    assert len({tuple(tokens) for tokens in alone}) > 4
    assert engine.stats().prompt_tokens == 8 * len(PROMPT)

    forks = tuple(Fork(f"fork-{k}", seed=k) for k in range(1, 8))
    engine.add(msgspec.structs.replace(sampled("fork-0", 0, adapter), forks=forks))
    outputs = run(engine)
    assert [tokens_of(outputs[f"fork-{k}"]) for k in range(8)] == alone
    assert engine.stats().prompt_tokens == 8 * len(PROMPT) + len(PROMPT) + 7
    assert_at_rest(engine)
    engine.close()
