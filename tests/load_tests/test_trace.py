from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import pytest

from load_tests.trace import (
    Lengths,
    TraceSpec,
    adapter_names,
    generate,
    popularity,
    read_trace,
    write_trace,
)

SPEC = TraceSpec(
    requests=4000,
    adapters=adapter_names(50),
    rate=20.0,
    base_share=0.2,
    prompt_tokens=Lengths.parse("uniform:4:8"),
    output_tokens=Lengths.parse("uniform:2:40"),
)


def changed(**changes: object) -> TraceSpec:
    return msgspec.structs.replace(SPEC, **changes)


def test_equal_specs_give_equal_traces_and_seeds_differ() -> None:
    assert generate(SPEC) == generate(SPEC)
    assert generate(SPEC) != generate(changed(seed=1))


def test_changing_one_property_leaves_the_others() -> None:
    plain, faster = generate(SPEC), generate(changed(rate=40.0, output_tokens=Lengths.parse("7")))
    assert [r.prompt for r in plain] == [r.prompt for r in faster]
    assert [r.adapter for r in plain] == [r.adapter for r in faster]
    assert faster[-1].arrival_s == pytest.approx(plain[-1].arrival_s / 2, rel=1e-4)
    assert {r.max_tokens for r in faster} == {7}


def test_file_round_trip(tmp_path: Path) -> None:
    trace = generate(changed(requests=20))
    write_trace(tmp_path / "deep" / "trace.jsonl", trace)
    assert read_trace(tmp_path / "deep" / "trace.jsonl") == trace
    assert len((tmp_path / "deep" / "trace.jsonl").read_text().splitlines()) == 20


def test_a_bad_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    write_trace(path, generate(changed(requests=2)))
    path.write_text(path.read_text() + '{"id": "x"}\n')
    with pytest.raises(ValueError, match=r"trace\.jsonl, line 3: .*id"):
        read_trace(path)


def test_popularity_is_a_power_law() -> None:
    shares = popularity(100, 1.2)
    assert shares.sum() == pytest.approx(1)
    assert shares[0] / shares[9] == pytest.approx(10**1.2)
    assert np.allclose(popularity(4, 0), 0.25)


def test_drawn_adapters_follow_the_popularity() -> None:
    trace = generate(changed(requests=20_000, prompt_tokens=Lengths.parse("1")))
    counts = Counter(r.rank for r in trace)
    assert counts[0] / 20_000 == pytest.approx(0.2, abs=0.02)
    shares = popularity(50, 1.0)
    for rank in (1, 2, 5, 20):
        assert counts[rank] / 16_000 == pytest.approx(shares[rank - 1], rel=0.2)
    assert all((r.adapter is None) == (r.rank == 0) for r in trace)
    assert all(r.adapter == f"adapter-{r.rank - 1:03d}" for r in trace if r.rank)


@pytest.mark.parametrize("burstiness", [0.0, 0.5, 1.0, 3.0])
def test_arrivals_have_the_asked_rate_and_burstiness(burstiness: float) -> None:
    trace = generate(changed(requests=20_000, burstiness=burstiness, prompt_tokens=Lengths.parse("1")))
    arrivals = np.array([r.arrival_s for r in trace])
    gaps = np.diff(arrivals)
    assert arrivals[0] == 0
    assert (gaps >= 0).all()
    assert gaps.mean() == pytest.approx(1 / 20, rel=0.1)
    assert gaps.std() / gaps.mean() == pytest.approx(burstiness, rel=0.1, abs=1e-3)


def test_without_a_rate_nothing_waits() -> None:
    assert {r.arrival_s for r in generate(changed(rate=None))} == {0.0}


def test_lengths() -> None:
    rng = np.random.default_rng(0)
    assert set(Lengths.parse("12").draw(rng, 5).tolist()) == {12}
    uniform = Lengths.parse("uniform:3:5").draw(rng, 1000)
    assert set(uniform.tolist()) == {3, 4, 5}
    lognormal = Lengths.parse("lognormal:100:0.8:300").draw(rng, 20_000)
    assert np.median(lognormal) == pytest.approx(100, rel=0.05)
    assert lognormal.max() == 300
    assert lognormal.min() >= 1
    assert np.log(lognormal[lognormal < 300]).std() < 0.8


@pytest.mark.parametrize(
    "text",
    ["", "0", "-3", "x", "uniform:5", "uniform:5:3", "lognormal:10:1", "gauss:1:2", "lognormal:9:nan:20"],
)
def test_bad_lengths_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="length"):
        Lengths.parse(text)


def test_prompts_lie_in_the_id_range_and_have_the_asked_lengths() -> None:
    prompts = [r.prompt for r in generate(changed(token_ids=(5, 9)))]
    assert {len(prompt) for prompt in prompts} == {4, 5, 6, 7, 8}
    assert {token for prompt in prompts for token in prompt} == {5, 6, 7, 8, 9}


def test_text_prompts() -> None:
    assert {r.prompt for r in generate(changed(prompts=("one", "two")))} == {"one", "two"}


@dataclass
class Wrong:
    changes: dict[str, object]
    complaint: str


@pytest.mark.parametrize(
    "wrong",
    [
        Wrong({"requests": 0}, "requests"),
        Wrong({"alpha": -1.0}, "alpha"),
        Wrong({"base_share": 1.5}, "base_share"),
        Wrong({"adapters": ()}, "adapters"),
        Wrong({"rate": 0.0}, "rate"),
        Wrong({"burstiness": float("nan")}, "burstiness"),
        Wrong({"token_ids": (9, 5)}, "token_ids"),
    ],
    ids=lambda wrong: wrong.complaint,
)
def test_bad_specs_are_refused(wrong: Wrong) -> None:
    with pytest.raises(ValueError, match=wrong.complaint):
        changed(**wrong.changes)


def test_adapter_names_are_wide_enough_to_sort() -> None:
    assert adapter_names(2) == ("adapter-000", "adapter-001")
    names = adapter_names(1500)
    assert list(names) == sorted(names)
