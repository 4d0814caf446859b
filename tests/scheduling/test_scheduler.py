from __future__ import annotations

import pytest

from server.messages import AdapterRef, ErrorCode, Logprobs
from server.scheduling.adapter_gate import AcquireStatus
from server.scheduling.block_pool import BlockPool
from server.scheduling.scheduler import Scheduler
from server.scheduling.sequence import Sequence, State
from server.scheduling.step_plan import StepPlan
from tests.scheduling.fake_step import FakeGate, Harness, alone, request


def described(plan: StepPlan) -> list[tuple[str, int, int, bool]]:
    return [(run.seq.request_id, run.start, run.num_tokens, run.rows > 0) for run in plan.runs]


# -- one sequence, and the shape of a plan


def test_a_prompt_then_one_token_a_step() -> None:
    h = Harness()
    h.add(request("a", [1, 2, 3, 4, 5], max_tokens=3))
    assert described(h.step()) == [("a", 0, 5, True)]
    assert described(h.step()) == [("a", 5, 1, True)]
    assert described(h.step()) == [("a", 6, 1, True)]
    assert not h.scheduler.has_work
    assert (h.tokens("a"), h.reason("a")) == alone(h.requests["a"], 256)
    assert described(h.scheduler.plan()) == []


def test_runs_of_a_mix_are_neighbours_and_the_base_model_comes_last() -> None:
    h = Harness()
    half = AdapterRef("x", "/x", 0.5)
    mixes: list[tuple[str | AdapterRef, ...]] = [("x",), (), ("y",), ("x",), (half,), (), ("x", "y"), ("y",)]
    h.add(*(request(f"r{i}", 2, *mix, max_tokens=9) for i, mix in enumerate(mixes)))
    for _ in range(3):
        names = [run.seq.request_id for run in h.step().runs]
        assert names == ["r0", "r3", "r2", "r7", "r4", "r6", "r1", "r5"]


def test_a_plan_counts_its_tokens_and_samples() -> None:
    h = Harness(max_num_batched_tokens=10)
    h.add(request("a", 4), request("b", 20))
    plan = h.step()
    assert described(plan) == [("a", 0, 4, True), ("b", 0, 6, False)]
    assert sum(run.num_tokens for run in plan.runs) == 10
    assert sum(run.rows for run in plan.runs) == 1


def test_a_long_prompt_is_chunked_beside_a_stream_that_gets_a_token_every_step() -> None:
    h = Harness(max_num_batched_tokens=8)
    h.add(request("stream", 2, max_tokens=30))
    h.step()
    h.add(request("long", 50, max_tokens=2))
    plans = [described(h.step()) for _ in range(9)]
    assert all(any(name == "stream" for name, *_ in plan) for plan in plans)
    assert [plan[1][1:] for plan in plans[:8]] == [(7 * i, min(7, 50 - 7 * i), i == 7) for i in range(8)]
    assert len(h.tokens("long")) == 2


def test_a_chunk_that_leaves_one_token_is_followed_by_it() -> None:
    h = Harness(max_num_batched_tokens=4)
    h.add(request("a", 5, max_tokens=2))
    assert [described(h.step())[0][1:] for _ in range(3)] == [(0, 4, False), (4, 1, True), (5, 1, True)]
    h = Harness(max_num_batched_tokens=2, max_num_seqs=2)
    h.add(request("stream", 1, max_tokens=20))
    h.step()
    h.add(request("b", 4, max_tokens=2))
    for _ in range(5):
        h.step()
    assert len(h.tokens("b")) == 2


def test_no_more_sequences_than_tokens_or_places() -> None:
    for max_num_seqs, budget, expected in [(3, 32, 3), (8, 5, 5)]:
        h = Harness(max_num_seqs=max_num_seqs, max_num_batched_tokens=budget)
        h.add(*(request(f"r{i}", 1, max_tokens=6) for i in range(9)))
        assert len(h.step().runs) == expected
        assert (h.scheduler.running, h.scheduler.waiting) == (expected, 9 - expected)


@pytest.mark.parametrize("wrong", ["max_num_seqs", "max_num_batched_tokens", "max_model_len"])
def test_limits_must_be_positive(wrong: str) -> None:
    limits = {"max_num_seqs": 1, "max_num_batched_tokens": 1, "max_model_len": 1, wrong: 0}
    with pytest.raises(ValueError, match="positive"):
        Scheduler(BlockPool(1, 1), FakeGate(1), **limits)


# -- how a sequence ends


def test_eos_and_stop_tokens_end_it_and_are_named() -> None:
    h = Harness()
    h.add(request("a", [1], max_tokens=200, ignore_eos=False))
    h.drain()
    tokens, reason = alone(h.requests["a"], 256)
    assert (h.tokens("a"), h.reason("a"), reason) == (tokens, "stop", "stop")
    assert h.outputs["a"][-1].stop_token == 0
    h.add(request("b", [1], max_tokens=200, stop_token_ids=(tokens[0],)))
    h.drain()
    assert (h.tokens("b"), h.outputs["b"][-1].stop_token) == (tokens[:1], tokens[0])


def test_max_model_len_ends_it() -> None:
    h = Harness(max_model_len=10)
    h.add(request("a", 7, max_tokens=100))
    h.drain()
    assert (len(h.tokens("a")), h.reason("a")) == (3, "length")


def test_logprobs_go_out_with_their_token() -> None:
    h = Harness()
    h.add(request("a", 2), request("b", 2))
    plan = h.scheduler.plan()
    found = Logprobs(3, -0.5, [(3, -0.5)])
    outputs = h.scheduler.update(plan, [[3], [4]], [[found], []])
    assert [(o.token_ids, o.logprobs) for o in outputs] == [([3], [found]), ([4], None)]


def test_update_wants_a_token_for_each_run_that_samples() -> None:
    h = Harness()
    h.add(request("a", 2))
    with pytest.raises(ValueError, match="0 tokens for 1 runs"):
        h.scheduler.update(h.scheduler.plan(), [])


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "fits"),
    [
        (8, 9, True),
        (8, 10, False),
        (15, 2, True),
        (16, 1, True),
        (17, 1, False),
        (16, 2, False),
        (1, 16, True),
    ],
)
def test_what_can_never_fit_is_refused_and_what_just_fits_runs(
    prompt: int, max_tokens: int, fits: bool
) -> None:
    h = Harness(num_blocks=4, block_size=4)  # 16 tokens; the last one generated is never computed
    h.add(request("a", prompt, max_tokens=max_tokens))
    h.drain()
    assert h.reason("a") == ("length" if fits else "error")
    if not fits:
        assert h.outputs["a"][0].error is ErrorCode.NEVER_FITS
        assert "16 tokens" in h.outputs["a"][0].message
    assert h.pool.held == 0


def test_a_prompt_that_leaves_no_room_for_output_or_is_empty_is_refused() -> None:
    h = Harness(max_model_len=8)
    h.add(request("a", 8), request("b", []), request("c", 7))
    h.drain()
    assert [h.outputs[name][0].error for name in "abc"] == [ErrorCode.NEVER_FITS] * 2 + [None]
    assert len(h.tokens("c")) == 1


def test_a_request_id_in_use_is_refused() -> None:
    h = Harness()
    h.add(request("a", 2))
    with pytest.raises(ValueError, match="already here"):
        h.scheduler.add(Sequence(request("a", 2), 0.0, 1))
    h.drain()
    h.add(request("a", 2))  # free again


# -- abort and fail, at any moment


def test_abort_while_waiting_running_and_waiting_for_an_adapter() -> None:
    gate = FakeGate(capacity=1, copy_steps=3)
    h = Harness(gate=gate, max_num_seqs=2)
    a, b, c, d = h.add(
        request("a", 9, max_tokens=50), request("b", 2, "x"), request("c", 2, max_tokens=50), request("d", 2)
    )
    h.step()
    states = [seq.state for seq in (a, b, c, d)]
    assert states == [State.RUNNING, State.WAITING_FOR_ADAPTER, State.RUNNING, State.WAITING]
    counts = (h.scheduler.running, h.scheduler.waiting, h.scheduler.waiting_for_adapter)
    assert (counts, h.scheduler.waiting_digests) == ((2, 2, 1), ("x",))
    for name in "bdac":
        assert h.scheduler.abort(name)
        assert not h.scheduler.abort(name)
    assert all(seq.state is State.FINISHED for seq in (a, b, c, d))
    assert (h.pool.held, h.scheduler.has_work, h.scheduler.waiting_digests) == (0, False, ())
    assert gate.cancelled == [("x",)]
    assert h.outputs["b"] == [] == h.outputs["d"]


def test_a_promise_is_kept_while_others_wait_for_it() -> None:
    gate = FakeGate(capacity=1, copy_steps=9)
    h = Harness(gate=gate)
    h.add(request("a", 2, "x"), request("b", 2, AdapterRef("x", "/x", 0.5)))
    h.step()
    h.scheduler.abort("a")
    assert (gate.cancelled, gate.promises) == ([], {frozenset("x")})
    h.scheduler.abort("b")
    assert (gate.cancelled, gate.promises) == ([("x",)], set())


def test_abort_of_a_running_adapter_sequence_gives_its_references_back() -> None:
    h = Harness()
    h.add(request("a", 9, "x", "y", max_tokens=50))
    h.step()
    assert h.gate.references == {"x": 1, "y": 1}
    h.scheduler.abort("a")
    assert not +h.gate.references
    assert h.gate.cancelled == []


def test_what_ends_between_plan_and_update_gets_no_token_and_registers_no_block() -> None:
    h = Harness()
    h.add(request("a", 8), request("b", [9] * 8), request("c", 2))
    plan = h.scheduler.plan()
    tokens = h.model(plan)
    h.scheduler.abort("a")
    output = h.scheduler.fail("b", ErrorCode.NON_FINITE, "not a number")
    assert output is not None
    assert (output.finish_reason, output.error, output.token_ids) == ("error", ErrorCode.NON_FINITE, [])
    assert [o.request_id for o in h.scheduler.update(plan, tokens)] == ["c"]
    assert (h.pool.cached, h.pool.held) == (0, 1)
    assert h.scheduler.fail("b", ErrorCode.INTERNAL, "") is None


def test_a_step_that_failed_is_planned_again() -> None:
    h = Harness(num_blocks=6)
    h.add(request("a", 4, "x", max_tokens=9), request("b", 7, max_tokens=9))
    h.step()
    lost = described(h.scheduler.plan())
    assert described(h.scheduler.plan()) == lost
    h.drain()
    assert [h.tokens(name) for name in "ab"] == [alone(h.requests[name], 256)[0] for name in "ab"]


def test_everything_can_be_failed_at_shutdown() -> None:
    h = Harness(gate=FakeGate(1), max_num_seqs=2)
    h.add(request("a", 4, "x"), request("b", 4, "y"), request("c", 4), request("d", 4))
    h.step()
    h.collect([h.scheduler.fail(name, ErrorCode.INTERNAL, "stopping") for name in h.scheduler.request_ids])
    assert all(h.reason(name) == "error" for name in "abcd")
    assert (h.pool.held, h.scheduler.has_work) == (0, False)
    assert not +h.gate.references


# -- preemption


def test_the_youngest_makes_way_and_loses_nothing() -> None:
    h = Harness(num_blocks=6, block_size=4, prefix_caching=False)
    a, b = h.add(request("a", 8, max_tokens=12), request("b", [3] * 7, "x", max_tokens=10))
    h.drain()
    assert (a.num_preemptions, b.num_preemptions) == (0, 1)
    assert h.scheduler.preemptions == 1
    for name in "ab":
        assert h.tokens(name) == alone(h.requests[name], 256)[0]
    assert h.scheduler.prompt_tokens == 8 + 7 + 7
    assert h.scheduler.generated_tokens == 22


def test_nobody_makes_way_while_there_are_blocks() -> None:
    h = Harness(num_blocks=6, block_size=4)
    h.add(request("a", 4, max_tokens=9), request("b", [3] * 4, max_tokens=9))  # three blocks each
    h.drain()
    assert h.scheduler.preemptions == 0


def test_a_new_sequence_leaves_a_block_for_each_running_one_to_grow_into() -> None:
    h = Harness(num_blocks=4, block_size=4)
    h.add(request("a", 2, max_tokens=8))
    h.step()
    h.add(request("b", [3] * 12, max_tokens=1))  # three blocks are there, but "a" will want one of them
    h.step()
    assert (h.scheduler.running, h.scheduler.waiting) == (1, 1)
    h.drain()
    assert h.scheduler.preemptions == 0


def test_a_prompt_preempted_half_way_takes_up_its_own_blocks_but_counts_no_cache_hit() -> None:
    h = Harness(max_num_batched_tokens=6)
    h.add(request("a", 2, max_tokens=20), request("b", 12))
    h.step()
    h.step()
    assert h.sequences["b"].num_computed == 4 + 5
    assert h.scheduler.preempt()
    assert described(h.step())[1] == ("b", 8, 4, True)
    h.drain()
    assert h.outputs["b"][0].cached_tokens == 0
    assert h.scheduler.cached_prompt_tokens == 0


def test_a_plan_from_before_a_preemption_is_not_taken_in() -> None:
    h = Harness()
    h.add(request("a", 4), request("b", 3))
    h.step()
    old = h.scheduler.plan()
    assert h.scheduler.preempt()
    h.scheduler.plan()  # "b" starts again
    assert [output.request_id for output in h.scheduler.update(old, [[1], [1]])] == ["a"]
    assert h.sequences["b"].num_computed == 0


def test_a_preempted_sequence_goes_before_the_others_that_wait() -> None:
    h = Harness(num_blocks=6, block_size=4, max_num_seqs=2)
    h.add(request("a", 8, max_tokens=12), request("b", [3] * 7, max_tokens=10), request("c", 1))
    while not h.scheduler.preemptions:
        h.step()
    h.drain()
    assert h.started["c"] > h.started["b"]
    ended = {name: h.outputs[name][-1] for name in "abc"}
    assert all(output.finish_reason == "length" for output in ended.values())
    assert h.sequences["c"].num_preemptions == 0


def test_the_engine_may_ask_for_a_preemption_but_the_last_one_stays() -> None:
    h = Harness()
    a, b = h.add(request("a", 4), request("b", 4, "x"))
    assert not h.scheduler.preempt()
    h.step()
    assert h.scheduler.preempt()
    assert (a.state, b.state, b.block_ids) == (State.RUNNING, State.WAITING, [])
    assert not +h.gate.references
    assert not h.scheduler.preempt()
    h.drain()
    assert h.tokens("b") == alone(h.requests["b"], 256)[0]


def test_a_long_prompt_at_the_front_is_not_overtaken_for_blocks() -> None:
    h = Harness(num_blocks=10, block_size=4, max_num_batched_tokens=64)
    h.add(request("a", 16, max_tokens=5), request("long", 30, max_tokens=2), request("short", 1))
    h.step()
    assert h.scheduler.running == 1
    h.drain()
    assert h.started["long"] <= h.started["short"]
    assert h.scheduler.preemptions == 0


# -- prefix reuse


def test_a_second_request_takes_the_blocks_of_the_first() -> None:
    h = Harness()
    h.add(request("a", [1, 2, 3, 4, 5, 6, 7, 8, 9, 9], "x"))
    h.drain()
    h.add(request("b", [1, 2, 3, 4, 5, 6, 7, 8, 7], "x"), request("c", [1, 2, 3, 4, 5, 6, 7, 8], "x"))
    plan = h.step()
    assert described(plan) == [("b", 8, 1, True), ("c", 4, 4, True)]  # never the whole prompt
    h.drain()
    assert [[o.cached_tokens for o in h.outputs[name]][:2] for name in "abc"] == [[0, 0], [8, 0], [4, 0]]
    assert (h.scheduler.cached_prompt_tokens, h.scheduler.prompt_tokens) == (12, 27 - 12)
    for name in "abc":
        assert h.tokens(name) == alone(h.requests[name], 256)[0]


def test_generated_tokens_are_reused_as_well() -> None:
    h = Harness()
    h.add(request("a", [1, 2, 3], max_tokens=10))
    h.drain()
    turn = [1, 2, 3, *h.tokens("a"), 5]
    h.add(request("b", turn))
    h.drain()
    assert h.outputs["b"][0].cached_tokens == 12


@pytest.mark.parametrize(
    "other", [(), ("y",), (AdapterRef("x", "/x", 0.5),), ("x", "y"), (AdapterRef("x", "/x", -1.0),)]
)
def test_other_adapters_or_weights_take_nothing(other: tuple[str | AdapterRef, ...]) -> None:
    h = Harness()
    h.add(request("a", [1] * 12, "x"))
    h.drain()
    h.add(request("b", [1] * 12, *other))
    h.drain()
    assert h.outputs["b"][0].cached_tokens == 0
    assert h.tokens("b") == alone(h.requests["b"], 256)[0]


def test_the_path_of_an_adapter_is_no_part_of_its_identity() -> None:
    h = Harness()
    h.add(request("a", [1] * 12, AdapterRef("x", "/one")))
    h.drain()
    h.add(request("b", [1] * 12, AdapterRef("x", "/two")))
    h.drain()
    assert h.outputs["b"][0].cached_tokens == 8


# -- adapters


def test_arrival_starts_the_copy_and_others_do_not_wait_for_it() -> None:
    gate = FakeGate(capacity=2, copy_steps=3)
    h = Harness(gate=gate, seconds_per_step=100.0)  # however long it takes, nobody waits for a copy
    h.add(request("a", 2, "x"))
    assert gate.prefetched == ["x"]
    h.add(request("b", 2, "y"), request("c", 2))
    assert [run.seq.request_id for run in h.step().runs] == ["c"]
    assert h.scheduler.waiting_for_adapter == 2
    h.step()
    assert {run.seq.request_id for run in h.step().runs} == {"a", "b", "c"}
    assert h.scheduler.waiting_for_adapter == 0


def test_runnable_tells_waiting_for_adapters_from_work() -> None:
    h = Harness(gate=FakeGate(capacity=1, copy_steps=2))
    assert (h.scheduler.runnable, h.scheduler.has_work) == (False, False)
    h.add(request("a", 2, "x"))
    assert h.scheduler.runnable
    h.step()
    assert (h.scheduler.runnable, h.scheduler.has_work) == (False, True)
    h.add(request("b", 2))
    assert h.scheduler.runnable
    h.step()
    assert h.scheduler.runnable


def test_an_adapter_that_cannot_be_loaded_ends_its_sequences_and_no_others() -> None:
    h = Harness(gate=FakeGate(capacity=2, broken=frozenset({"bad"})))
    h.add(request("a", 2, "bad"), request("b", 2, "good", "bad"), request("c", 2, "good"))
    plan = h.step()
    assert [output.request_id for output in plan.failed] == ["a", "b"]
    assert [run.seq.request_id for run in plan.runs] == ["c"]
    assert h.outputs["a"][0].error is ErrorCode.ADAPTER_LOAD_FAILED
    assert h.outputs["a"][0].message == "no such adapter"
    assert h.gate.cancelled == [("bad",), ("good", "bad")]
    h.drain()
    assert not +h.gate.references


def endless(h: Harness, name: str, adapter: str, steps: int) -> None:
    """Requests for `adapter` that overlap, so that it is in use all the time."""
    for i in range(steps):
        if i % 2 == 0:
            h.add(request(f"{name}{i}", 2, adapter, max_tokens=4))
        h.step()


@pytest.mark.parametrize(("patience_s", "served"), [(1.0, True), (float("inf"), False)])
def test_a_stream_of_requests_for_one_adapter_does_not_starve_another(
    patience_s: float, served: bool
) -> None:
    h = Harness(gate=FakeGate(capacity=1), patience_s=patience_s)
    endless(h, "before", "hot", 5)
    h.add(request("cold", 2, "cold"))
    added = h.clock()
    endless(h, "after", "hot", 40)
    assert ("cold" in h.started) is served
    if served:  # its patience, and four tokens of the last one that overtook it
        assert h.started["cold"] - added < 1.0 + 6 * h.seconds_per_step
    h.drain()
    assert h.reason("cold") == "length"


def test_those_of_the_same_mix_start_with_the_one_that_starved() -> None:
    h = Harness(gate=FakeGate(capacity=1), patience_s=1.0)
    h.add(request("hot", 2, "hot", max_tokens=30))
    h.step()
    h.add(*(request(f"{name}{i}", 2, name) for i in range(3) for name in ("x", "y")))
    while "x0" not in h.started:
        h.step()
    assert h.started["x0"] == h.started["x1"] == h.started["x2"]
    h.drain()
    assert h.started["y0"] == h.started["y1"] == h.started["y2"] > h.started["x0"]
    assert h.gate.copies == 3


def test_base_requests_run_while_adapters_wait_for_room() -> None:
    h = Harness(gate=FakeGate(capacity=1), patience_s=0.5)
    h.add(request("hot", 2, "hot", max_tokens=40))
    h.step()
    h.add(request("cold", 2, "cold"))
    for _ in range(10):
        h.step()
    h.add(request("base", 2))
    h.step()
    assert "base" in h.started
    assert "cold" not in h.started


def test_pins_that_leave_no_room_starve_one_adapter_but_do_not_stop_the_others() -> None:
    h = Harness(gate=FakeGate(capacity=1, pinned=frozenset({"pinned"})), patience_s=0.5)
    h.add(request("never", 2, "cold"))
    endless(h, "served", "pinned", 60)
    assert sum(name.startswith("served") and h.reason(name) == "length" for name in h.outputs) > 10
    assert "never" not in h.started
    h.gate.pinned = frozenset()
    h.drain()
    assert h.reason("never") == "length"


def test_forty_adapters_over_room_for_two_all_finish_in_turn() -> None:
    h = Harness(gate=FakeGate(capacity=2, copy_steps=2), patience_s=1.0, max_num_seqs=8)
    h.add(*(request(f"r{i}", 3, f"adapter{i % 40}", max_tokens=5) for i in range(120)))
    h.drain()
    for name, item in h.requests.items():
        assert h.tokens(name) == alone(item, 256)[0]
    # one turn for each adapter, two at a time, each a copy and five tokens: everyone's wait is bounded
    assert max(h.started.values()) < 20 * 8 * h.seconds_per_step
    assert h.gate.copies == 40


def test_a_composition_takes_all_its_adapters_or_none() -> None:
    h = Harness(gate=FakeGate(capacity=2), patience_s=0.5)
    h.add(request("a", 2, "x", max_tokens=20))
    h.step()
    h.add(request("both", 2, "y", "z"), request("c", 2, "x", max_tokens=40))
    h.step()
    assert h.gate.references == {"x": 2}
    h.drain()
    assert h.gate.acquire(h.requests["both"].adapters).status is AcquireStatus.READY
    assert h.reason("both") == "length"
