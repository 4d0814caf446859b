import numpy as np
import pytest

from server.messages import AdapterRef, Request, SamplingParams
from server.scheduling.sequence import UNREAD, Sequence, State


def make(prompt: list[int], adapters: tuple[AdapterRef, ...] = (), **sampling: object) -> Sequence:
    params = SamplingParams(**{"max_tokens": 4, **sampling})  # type: ignore[arg-type]  # free-form in tests
    return Sequence(Request("r", prompt, params, adapters), arrival=1.5, order=7)


def test_starts_waiting_with_its_prompt() -> None:
    seq = make([5, 6, 7])
    assert seq.state is State.WAITING
    assert seq.tokens.tolist() == [5, 6, 7]
    assert seq.tokens.dtype == np.int64
    assert (seq.num_prompt_tokens, seq.num_tokens, seq.num_computed, seq.num_generated) == (3, 3, 0, 0)
    assert (seq.arrival, seq.order, seq.last_token) == (1.5, 7, 7)


def test_append_grows_past_the_buffer_and_keeps_everything() -> None:
    seq = make([1])
    for token in range(100):
        seq.append(token)
    assert seq.tokens.tolist() == [1, *range(100)]
    assert seq.tokens[-seq.num_generated :].tolist() == list(range(100))
    assert (seq.num_generated, seq.last_token) == (100, 99)


def test_tokens_is_a_view_not_a_copy() -> None:
    seq = make([1, 2, 3, 4])
    assert np.shares_memory(seq.tokens, seq.tokens)


def test_mix_key_is_content_and_weight_in_order() -> None:
    first, second = AdapterRef("a", "/x"), AdapterRef("b", "/y", 0.5)
    assert make([1]).mix_key == ()
    assert make([1], (first, second)).mix_key == (("a", 1.0), ("b", 0.5))
    assert make([1], (AdapterRef("a", "/elsewhere"),)).mix_key == make([1], (first,)).mix_key


def test_seed_is_the_requests_or_drawn() -> None:
    assert make([1], seed=42).seed == 42
    assert make([1], seed=0).seed == 0
    drawn = {make([1]).seed for _ in range(20)}
    assert len(drawn) == 20
    assert all(0 <= seed < 2**63 for seed in drawn)


@pytest.mark.parametrize(
    ("sampling", "tokens", "expected"),
    [
        ({}, [9], None),
        ({}, [9, 9, 9, 9], "length"),
        ({}, [0], "stop"),
        ({"ignore_eos": True}, [0], None),
        ({"ignore_eos": True, "stop_token_ids": (0,)}, [0], "stop"),
        ({"stop_token_ids": (3,)}, [3], "stop"),
        ({"stop_token_ids": (3,)}, [0], "stop"),
        ({"min_tokens": 2}, [0], None),
        ({"min_tokens": 2}, [0, 0], "stop"),
        ({"min_tokens": 2, "stop_token_ids": (3,)}, [3], None),
        ({"max_tokens": 1}, [0], "stop"),
        ({"max_tokens": 100}, [9, 9, 9, 9, 9, 9], None),
        ({"max_tokens": 100}, [9, 9, 9, 9, 9, 9, 9], "length"),
    ],
)
def test_finish_reason(sampling: dict[str, object], tokens: list[int], expected: str | None) -> None:
    seq = make([1, 2, 3], **sampling)
    seq.limit(eos_token_ids=frozenset({0}), max_model_len=10)
    assert [seq.take(token) for token in tokens] == [*[None] * (len(tokens) - 1), expected]


def test_tokens_are_expected_before_they_are_taken() -> None:
    seq = make([1, 2], stop_token_ids=(9,))
    seq.expect()
    seq.expect()
    assert (seq.num_tokens, seq.num_unread, seq.last_token) == (4, 2, UNREAD)
    assert seq.take(7) is None
    assert (seq.tokens.tolist(), seq.num_unread, seq.last_token) == ([1, 2, 7, UNREAD], 1, UNREAD)
    assert seq.take(9) == "stop"
    assert (seq.tokens.tolist(), seq.num_unread, seq.last_token) == ([1, 2, 7, 9], 0, 9)
    assert seq.take(8) is None
    assert not seq.is_full
    seq.expect()
    assert seq.is_full
    assert seq.take(8) == "length"
