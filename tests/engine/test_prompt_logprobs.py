"""Log-probabilities of prompts: those of transformers and PEFT, whatever else runs, however they are cut."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import torch

from server.engine import engine as engine_module
from server.engine.engine import Engine
from server.messages import Fork, TokenOutput
from tests.engine.harness import MiB, adapter_ref, assert_at_rest, busy, greedy, make_engine, run, tokens_of
from tests.engine.prompt_scores import assert_right, prompt, scores_of, scoring
from tests.model.tiny_models import ARCHITECTURES, add_adapter, build, targets_of

pytestmark = pytest.mark.usefixtures("runs_beside_host")
FewRows = Callable[[int], None]


@pytest.fixture
def few_rows(monkeypatch: pytest.MonkeyPatch) -> FewRows:
    """Sets how many prompt tokens a step may score."""
    return lambda rows: monkeypatch.setattr(engine_module, "scored_tokens", lambda vocab_size: rows)


@pytest.fixture(scope="module")
def adapter(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    return add_adapter(model, folder, seed=1, rank=4, target_modules=targets_of("llama"))


@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
@pytest.mark.parametrize("attention", ["auto", "reference"])
def test_they_are_those_of_transformers_and_peft(
    architecture: str, attention: str, tmp_path: Path, few_rows: FewRows
) -> None:
    """In chunks, beside each other and beside those who ask for none; fused layers and torch's modules."""
    few_rows(11)
    model = build(architecture, tmp_path / "model")
    adapter = add_adapter(model, tmp_path / "a", seed=1, rank=4, target_modules=targets_of(architecture))
    engine = make_engine(model, max_num_batched_tokens=24, block_size=8, attention=attention)
    asked = [(40, adapter), (9, None), (2, adapter), (1, None), (33, None)]
    requests = [
        (scoring(f"{i}", prompt(n, i), who, top=i, tokens=i % 2), who) for i, (n, who) in enumerate(asked)
    ]
    others = [greedy(f"other-{i}", prompt(20, 90 + i), 6, [adapter_ref(adapter)] * (i % 2)) for i in range(3)]
    for request in (others[0], *(request for request, _ in requests), *others[1:]):
        engine.add(request)
    outputs = run(engine)
    for i, (request, who) in enumerate(requests):
        assert_right(model, request, scores_of(outputs[request.request_id]), who)
        assert len(tokens_of(outputs[request.request_id])) == i % 2
        assert outputs[request.request_id][-1].finish_reason == "length"
    assert not any(scores_of(outputs[other.request_id]) for other in others)
    assert_at_rest(engine)
    engine.close()


def test_a_step_never_has_more_rows_than_it_may(
    model: Path, few_rows: FewRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    few_rows(5)
    engine = make_engine(model, max_num_batched_tokens=64)
    rows: list[int] = []
    logits = engine._runner.logits

    def counted(batch, arena):  # type: ignore[no-untyped-def]  # as the method
        rows.append(len(batch.sample_rows))
        return logits(batch, arena)

    monkeypatch.setattr(engine._runner, "logits", counted)
    for i in range(3):
        engine.add(scoring(f"{i}", prompt(60, i)))
    outputs = run(engine)
    engine.close()
    assert all(len(scores_of(outputs[f"{i}"])) == 59 for i in range(3))
    assert max(rows) <= 5 + 3  # and one for each that is sampled


def test_a_prefix_in_the_cache_is_computed_again_for_them(model: Path, adapter: Path) -> None:
    engine = make_engine(model)
    ids = prompt(70, 1)
    engine.add(greedy("first", ids, 4, [adapter_ref(adapter)]))
    want = tokens_of(run(engine)["first"])
    for name, options in (("again", {}), ("and again", {"top": 0})):
        request = scoring(name, ids, adapter, tokens=4, **options)
        engine.add(request)
        outputs = run(engine)[name]
        assert_right(model, request, scores_of(outputs), adapter)
        assert tokens_of(outputs) == want
        assert outputs[-1].cached_tokens == 0
    engine.add(greedy("last", ids, 4, [adapter_ref(adapter)]))
    assert next(output.cached_tokens for output in run(engine)["last"] if output.cached_tokens) == 64
    engine.close()


@pytest.mark.parametrize("tokens", [0, 1, 3])
@pytest.mark.parametrize("length", [1, 2, 17, 33])
def test_a_prompt_alone(model: Path, length: int, tokens: int) -> None:
    """max_tokens 0 is one answer without a token, also where the last chunk is one token."""
    engine = make_engine(model, max_num_batched_tokens=16, max_num_seqs=4, block_size=8)
    request = scoring("a", prompt(length, 3), tokens=tokens)
    plain = greedy("b", prompt(length, 3), tokens)
    for each in (request, plain):
        engine.add(each)
    outputs = run(engine)
    assert_right(model, request, scores_of(outputs["a"]))
    for name in "ab":
        assert len(tokens_of(outputs[name])) == tokens
        assert [output.finish_reason for output in outputs[name]].count("length") == 1
        assert sum(output.started_at is not None for output in outputs[name]) == 1
    assert_at_rest(engine)
    engine.close()


def test_a_prompt_alone_may_fill_the_context_and_the_cache(model: Path) -> None:
    engine = make_engine(model, max_model_len=64, kv_cache_bytes=64 * 2 * 2 * 16 * 4)
    full = scoring("full", prompt(64, 1), tokens=0)
    engine.add(full)
    engine.add(scoring("one more", prompt(64, 2), tokens=1))
    outputs = run(engine)
    assert_right(model, full, scores_of(outputs["full"]))
    assert outputs["one more"][-1].finish_reason == "error"
    engine.close()


def test_choices_of_one_prompt_compute_and_tell_it_once(model: Path, few_rows: FewRows) -> None:
    few_rows(10)
    engine = make_engine(model, max_num_batched_tokens=32)
    request = scoring("0", prompt(50, 1), tokens=3, temperature=1.0, seed=0)
    request = msgspec.structs.replace(request, forks=tuple(Fork(f"{k}", seed=k) for k in range(1, 4)))
    engine.add(request)
    outputs = run(engine)
    assert_right(model, request, scores_of(outputs["0"]))
    assert not any(scores_of(outputs[f"{k}"]) for k in range(1, 4))
    assert [len(tokens_of(outputs[f"{k}"])) for k in range(4)] == [3] * 4
    assert engine.stats().prompt_tokens == 50 + 3  # each further choice: the last one
    assert_at_rest(engine)
    engine.close()


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_preempted_half_way_each_is_told_once(
    model: Path, adapter: Path, few_rows: FewRows, prefix_caching: bool
) -> None:
    """Sent back to the line while its prompt is computed, and again while its output is."""
    few_rows(6)
    engine = make_engine(model, max_num_batched_tokens=64, prefix_caching=prefix_caching, block_size=8)
    requests = [scoring(f"{i}", prompt(60, i), adapter, tokens=12) for i in range(3)]
    for request in requests:
        engine.add(request)
    outputs: dict[str, list[TokenOutput]] = {}
    steps = 0
    while busy(engine):
        for output in engine.step()[0]:
            outputs.setdefault(output.request_id, []).append(output)
        steps += 1
        if steps % 4 == 0 and steps < 80:
            _preempt(engine, outputs)
    assert engine.stats().preemptions > 3
    for request in requests:
        assert_right(model, request, scores_of(outputs[request.request_id]), adapter)
        assert len(tokens_of(outputs[request.request_id])) == 12
    assert_at_rest(engine)
    engine.close()


def _preempt(engine: Engine, outputs: dict[str, list[TokenOutput]]) -> None:
    read: list[TokenOutput] = []
    engine._read(read, but=0)
    for output in read:
        outputs.setdefault(output.request_id, []).append(output)
    engine._scheduler.preempt()


def test_logits_that_are_not_finite_fail_their_own_request(
    model: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a row that gives no token, too."""
    engine = make_engine(model)
    logits = engine._runner.logits

    def broken(batch, arena):  # type: ignore[no-untyped-def]  # as the method
        logits_NV = logits(batch, arena).clone()
        if batch.segments is not None:  # the adapter's rows come first
            logits_NV[1, 7] = float("nan")
        return logits_NV

    monkeypatch.setattr(engine._runner, "logits", broken)
    engine.add(scoring("bad", prompt(9, 1), adapter))
    good = scoring("good", prompt(9, 2))
    engine.add(good)
    outputs = run(engine)
    engine.close()
    assert [output.error for output in outputs["bad"]] == ["non_finite_logits"]
    assert_right(model, good, scores_of(outputs["good"]))


def test_memory_that_runs_out_in_a_step_tells_none_twice(
    model: Path, few_rows: FewRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    few_rows(8)
    engine = make_engine(model, kv_cache_bytes=2 * MiB)
    launch, launches = engine._runner.launch, iter(range(100))

    def fails_at_times(batch, arena):  # type: ignore[no-untyped-def]  # as the method
        if next(launches) == 3:
            raise torch.OutOfMemoryError
        return launch(batch, arena)

    monkeypatch.setattr(engine._runner, "launch", fails_at_times)
    requests = [scoring(f"{i}", prompt(40, i)) for i in range(2)]
    for request in requests:
        engine.add(request)
    outputs = run(engine)
    engine.close()
    for request in requests:
        assert_right(model, request, scores_of(outputs[request.request_id]))
