"""Choices of one request: their prompt is computed once, whatever becomes of the one that computes it."""

from __future__ import annotations

import pytest

from server.messages import Fork, Request
from server.scheduling.prompt_group import sequences_of
from tests.scheduling.fake_step import FakeGate, Harness, alone, request


def choices(name: str, prompt: int, *adapters: str, n: int, **sampling: int) -> Request:
    first = request(name, prompt, *adapters, **sampling)  # type: ignore[arg-type]  # free-form
    forks = tuple(Fork(f"{name}.{k}", seed=k) for k in range(1, n))
    return Request(first.request_id, first.prompt_token_ids, first.sampling, first.adapters, forks)


def names(item: Request) -> list[str]:
    return [item.request_id, *(fork.request_id for fork in item.forks)]


def assert_served(h: Harness, item: Request) -> None:
    for name in names(item):
        assert (h.tokens(name), h.reason(name)) == alone(item, h.max_model_len)


def test_forks_are_sequences_of_their_own() -> None:
    item = choices("a", 5, n=3)
    first, second, third = sequences_of(item, 1.5, 7)
    assert [seq.order for seq in (first, second, third)] == [7, 8, 9]
    assert [seq.request_id for seq in (first, second, third)] == ["a", "a.1", "a.2"]
    assert (second.seed, third.seed) == (1, 2)
    second.append(9)
    assert first.num_tokens == third.num_tokens == 5
    assert first.group is second.group is third.group
    (alone_,) = sequences_of(request("b", 2), 0.0, 0)
    assert alone_.group is None


@pytest.mark.parametrize("prefix_caching", [True, False])
@pytest.mark.parametrize("prompt", [1, 3, 4, 5, 16, 18])
def test_a_prompt_is_computed_once_for_all_choices(prompt: int, prefix_caching: bool) -> None:
    """Each further choice computes the prompt's last token again, which gives it its logits."""
    h = Harness(prefix_caching=prefix_caching)
    item = choices("a", prompt, "x", n=8, max_tokens=3)
    h.add(item)
    h.drain()
    assert_served(h, item)
    assert h.scheduler.prompt_tokens == prompt + 7
    assert h.scheduler.cached_prompt_tokens == 0
    assert all(output.cached_tokens == 0 for name in names(item) for output in h.outputs[name])
    assert h.pool.held == 0
    assert not +h.gate.references


def test_whole_blocks_are_shared_and_the_last_one_is_copied() -> None:
    h = Harness()
    first, *others = h.add(choices("a", 10, n=3, max_tokens=6))
    assert [run.seq for run in h.step().runs] == [first]
    plan = h.step()
    assert [run.seq for run in plan.runs] == [first, *others]
    assert plan.copies == [(first.block_ids[2], seq.block_ids[2]) for seq in others]
    for seq in others:
        assert seq.block_ids[:2] == first.block_ids[:2]
        assert seq.block_ids[2] != first.block_ids[2]
    assert h.pool.held == 2 + 3
    assert h.step().copies == []


def test_those_without_a_place_wait_and_share_later_when_the_first_has_ended() -> None:
    h = Harness(max_num_seqs=2, prefix_caching=False)
    item = choices("a", 9, n=6, max_tokens=2)
    h.add(item)
    h.drain()
    assert_served(h, item)
    assert h.scheduler.prompt_tokens == 9 + 5


def test_when_the_leader_ends_early_another_computes_the_prompt() -> None:
    h = Harness(max_num_batched_tokens=4, prefix_caching=False)
    item = choices("a", 12, n=3, max_tokens=2)
    h.add(item)
    h.step()
    assert h.scheduler.abort("a")
    h.drain()
    assert h.tokens("a") == []
    for name in names(item)[1:]:
        assert (h.tokens(name), h.reason(name)) == alone(item, h.max_model_len)
    assert h.scheduler.prompt_tokens == 4 + 12 + 1


def test_a_lost_step_loses_no_copy() -> None:
    h = Harness()
    item = choices("a", 10, n=3, max_tokens=6)
    h.add(item)
    h.step()
    lost = h.scheduler.plan()
    assert len(lost.copies) == 2
    assert h.step().copies == lost.copies
    h.drain()
    assert_served(h, item)


def test_a_copy_for_a_choice_that_has_gone_is_not_made() -> None:
    h = Harness()
    h.add(choices("a", 10, n=3, max_tokens=6))
    h.step()
    h.scheduler.plan()
    h.scheduler.abort("a.1")
    assert len(h.step().copies) == 1
    h.drain()
    assert h.pool.held == 0


def test_kept_prompts_make_way_before_anybody_is_preempted() -> None:
    h = Harness(num_blocks=8, max_num_seqs=1, prefix_caching=False)
    item = choices("a", 16, n=2, max_tokens=12)  # 4 blocks of prompt, 7 in all
    h.add(item)
    h.drain()
    assert_served(h, item)
    assert h.scheduler.preemptions == 0
    assert h.scheduler.prompt_tokens == 16 + 1


def test_a_pool_that_the_prompt_fills_is_no_deadlock() -> None:
    h = Harness(num_blocks=4, prefix_caching=False)
    item = choices("a", 16, n=3, max_tokens=1)
    h.add(item)
    h.drain()
    assert_served(h, item)
    assert h.scheduler.prompt_tokens == 3 * 16, "with no room for a copy of the last block, each computes it"


def test_a_prompt_that_can_never_fit_is_refused_for_every_choice() -> None:
    h = Harness(num_blocks=2)
    item = choices("a", 16, n=3)
    h.add(item)
    assert [h.reason(name) for name in names(item)] == ["error"] * 3
    assert not h.scheduler.has_work


def test_choices_with_an_adapter_on_its_way_wait_for_it_together() -> None:
    h = Harness(gate=FakeGate(2, copy_steps=3))
    item = choices("a", 6, "x", n=3, max_tokens=2)
    h.add(item)
    h.drain()
    assert_served(h, item)
    assert h.scheduler.prompt_tokens == 6 + 2
