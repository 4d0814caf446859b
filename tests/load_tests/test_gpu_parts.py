"""The parts that share one engine or need none, on a tiny model: what they count, and what they notice."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from load_tests.gpu import ceilings, kernels, mixed, profiler, sampling
from load_tests.gpu.context import Context
from load_tests.gpu.figures import Deadline, Results
from load_tests.gpu.subject import Subject, Version, subject
from load_tests.gpu.workload import WORKLOADS
from server.messages import Request

WORK = WORKLOADS["tiny"]
SEQUENCES = WORK.sequences


@pytest.fixture(scope="module")
def on() -> Iterator[Subject]:
    with subject(
        "tiny",
        ranks=[WORK.rank],
        arena_ranks=WORK.rank * SEQUENCES,
        max_num_seqs=SEQUENCES + 1,
        kv_tokens=WORK.prompt + mixed.output_tokens(),
    ) as found:
        yield found


@pytest.fixture
def context(on: Subject) -> Context:
    return Context(WORK, Results("part"), Deadline(60), lambda: on)


def at_rest(on: Subject) -> bool:
    stats = on.engine.stats()
    return stats.running == stats.waiting == 0


def test_mixed_steps_and_decode_steps_take_turns(context: Context, on: Subject) -> None:
    before = on.engine.stats()
    mixed.measure(context)
    assert [row.mix for row in context.results.rows] == ["base", "distinct"]
    assert all(row.decode_s > 0 and row.mixed_s > 0 for row in context.results.rows)
    assert [(figure.name, figure.target) for figure in context.results.figures if figure.at_most] == [
        ("mixed step, base: time / decode step", "<= 1.30"),
        ("mixed step, distinct: time / decode step", "<= 1.30"),
    ]
    prompts = on.engine.stats().prompt_tokens - before.prompt_tokens
    assert prompts == 2 * WORK.prompt * (SEQUENCES + 2 + mixed.PAIRS)  # the batch's own, and one a pair
    on.turn()
    assert at_rest(on)


def test_a_prompt_that_does_not_join_is_an_error(on: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = [on.add(None, 8, 16)]
    on.begin(ids)
    monkeypatch.setattr(on.engine, "add", lambda request: None)
    with pytest.raises(RuntimeError, match="1 of 2 sequences"):
        mixed.time_pair(on, [None], prompt=8)
    on.engine.abort(ids)


def test_a_ratio_is_of_one_rounds_own_steps() -> None:
    time_ms, ratio = mixed.figures_of(
        "base", [mixed.Row("base", 0, 0.01, 0.014), mixed.Row("base", 1, 0.02, 0.02)]
    )
    assert time_ms.values == pytest.approx((14, 20))
    assert (ratio.values, ratio.verdict) == (pytest.approx((1.4, 1.0)), "ok")


def test_requests_are_sampled_as_they_say(
    context: Context, on: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    added: list[Request] = []
    add = on.engine.add
    monkeypatch.setattr(on.engine, "add", lambda request: (added.append(request), add(request)))
    sampling.measure(context)
    asked = {(request.sampling.temperature, request.sampling.top_p) for request in added}
    assert asked == {(0.0, 1.0), (0.8, 1.0), (0.8, 0.9)}
    assert [row.way for row in context.results.rows] == ["greedy", "temperature", "top-p"]
    assert [(figure.name, figure.target) for figure in context.results.figures] == [
        ("temperature: step / greedy", "-"),
        ("top-p: step / greedy", "<= 1.05"),
    ]


def test_every_operation_of_both_kinds_of_step_is_counted(context: Context, on: Subject) -> None:
    profiler.measure(context)
    rows = context.results.rows
    assert {row.step for row in rows} == {"decode", "mixed"}
    embeddings = {row.step: row.calls for row in rows if row.kernel == "aten::embedding"}
    assert embeddings == {"decode": WORK.profiled_steps, "mixed": WORK.profiled_steps}
    assert all(row.total_us > 0 for row in rows)
    assert "decode step of 4: kernels" in context.results.text
    assert at_rest(on)


def test_the_table_of_kernels_is_of_one_step() -> None:
    found = [profiler.Kernel("decode", "a" * 90, 6, 300.0), profiler.Kernel("decode", "b", 2, 100.0)]
    head, first, second = profiler.table(found, steps=2).splitlines()
    assert head.split() == ["calls", "us", "share"]
    assert first.split()[1:] == ["3.0", "150.0", "75.0%"]
    assert second.split() == ["b", "1.0", "50.0", "25.0%"]


def test_ceilings_are_measured_and_say_what_with(context: Context) -> None:
    ceilings.measure(context)
    assert [len(figure.values) for figure in context.results.figures] == [1, 1, 1]
    assert all(figure.median > 0 for figure in context.results.figures)
    assert context.results.about["versions"]["torch"] == torch.__version__
    assert f"torch {torch.__version__}" in context.results.text


def test_kernels_agree_with_the_padded_product(context: Context) -> None:
    pytest.importorskip("triton")
    kernels.measure(context)
    assert [(row.tokens, row.adapters) for row in context.results.rows] == list(WORK.kernel_batches)
    assert all(row.error < 1e-5 for row in context.results.rows)


def test_kernels_end_with_their_time(on: Subject) -> None:
    results = Results("kernels")
    kernels.measure(Context(WORK, results, Deadline(0), lambda: on))
    assert results.rows == []
    assert "out of time" in results.text


def test_adapters_of_a_profile_are_resident(on: Subject) -> None:
    """Nothing is copied into the arena while steps are profiled."""
    on.load(Version(WORK.rank, number) for number in range(SEQUENCES))
    before = on.engine.stats().adapter_loads
    profiler.measure(Context(WORK, Results("profile"), Deadline(60), lambda: on))
    assert on.engine.stats().adapter_loads == before
