"""What the scheduler tells of a sequence's start and of what is in use, for metrics and traces."""

from __future__ import annotations

from tests.scheduling.fake_step import FakeGate, Harness, request


def test_the_first_output_says_when_its_sequence_started_and_no_other_does() -> None:
    h = Harness(max_num_seqs=1, seconds_per_step=1.0)
    h.add(request("a", 2, max_tokens=3), request("b", 2, max_tokens=2))
    h.drain()
    assert [output.started_at for output in h.outputs["a"]] == [1.0, None, None]
    assert [output.started_at for output in h.outputs["b"]] == [h.started["b"], None]
    assert not any(output.waited_for_adapter for name in "ab" for output in h.outputs[name])


def test_a_preempted_sequence_started_when_it_first_ran() -> None:
    h = Harness(num_blocks=6, block_size=4, seconds_per_step=1.0)
    h.add(request("a", 8, max_tokens=12), request("b", 8, max_tokens=12))
    h.drain()
    assert h.scheduler.preemptions
    assert [h.outputs[name][0].started_at for name in "ab"] == [1.0, 1.0]


def test_who_waited_for_an_adapter_says_so() -> None:
    h = Harness(gate=FakeGate(capacity=2, copy_steps=3), seconds_per_step=1.0)
    h.add(request("a", 2, "x"), request("base", 2))
    h.drain()
    h.add(request("again", 2, "x"))
    h.drain()
    waited = {name: h.outputs[name][0].waited_for_adapter for name in ("a", "base", "again")}
    assert waited == {"a": True, "base": False, "again": False}
    assert h.outputs["a"][0].started_at == h.started["a"] == 3.0


def test_adapters_in_use_are_those_of_running_sequences_each_once() -> None:
    h = Harness(max_num_seqs=3)
    h.add(request("a", 2, "x", "y"), request("b", 2, "y"), request("c", 2), request("d", 2, "z"))
    h.step()
    assert sorted(h.scheduler.running_digests) == ["x", "y"]
    h.drain()
    assert h.scheduler.running_digests == ()


def test_tokens_looked_up_in_the_prefix_cache_are_counted_beside_those_found() -> None:
    h = Harness()
    for name in "ab":
        h.add(request(name, [1] * 12))
        h.drain()
    assert (h.scheduler.prefix_query_tokens, h.scheduler.cached_prompt_tokens) == (24, 8)
