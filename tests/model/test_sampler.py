from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch

from server.guidance import grammars
from server.guidance.matcher import Matcher, Vocabulary
from server.messages import SamplingParams
from server.model import logits as logits_module
from server.model.logits import PROCESSORS, Penalties, sampling_of, wanted
from server.model.sampler import SampledTokens, Sampler, torch_argmax, torch_draw
from server.model.sampling import SampleRow, uniforms
from tests.text import tiny_tokenizer

VOCAB = 50


def row(
    seed: int = 0,
    position: int | None = None,
    prompt: Iterable[int] = (),
    output: Iterable[int] = (),
    **params: object,
) -> SampleRow:
    tokens = np.array([*prompt, *output], np.int64)
    return SampleRow(
        SamplingParams(**({"max_tokens": 100} | params)),
        seed,
        len(tokens) if position is None else position,
        tokens,
        len(list(prompt)),
        eos_token_ids=(1,),
    )


def logits(seed: int = 0, rows: int = 1) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 2


class Plain:
    argmax = staticmethod(torch_argmax)
    draw = staticmethod(torch_draw)


def sample(logits_NV: torch.Tensor, rows: list[SampleRow], sampler: Sampler | None = None) -> SampledTokens:
    sampled = (sampler or Sampler(Plain())).sample(logits_NV, sampling_of(rows))
    return sampled.on_host(sampled.tensors())


def frequencies(logits_V: torch.Tensor, **params: object) -> torch.Tensor:
    """How often each token is drawn over many positions: [V]."""
    draws = 20_000
    rows = [row(seed=5, position=i, **params) for i in range(draws)]
    ids = sample(logits_V.expand(draws, -1), rows).token_ids
    return torch.bincount(torch.tensor(ids), minlength=VOCAB) / draws


def test_uniform_numbers_are_uniform_and_differ_by_seed_and_position() -> None:
    seeds, positions = np.meshgrid(np.arange(100, dtype=np.uint64), np.arange(100, dtype=np.uint64))
    values = uniforms(seeds.T.ravel(), positions.T.ravel())
    assert len(set(values)) == len(values)
    assert 0 <= values.min() < 0.001
    assert 0.999 < values.max() < 1
    assert abs(values.mean() - 0.5) < 0.01
    grid = values.reshape(100, 100) - 0.5
    assert abs((grid[:, 1:] * grid[:, :-1]).mean()) < 0.003
    assert abs((grid[1:] * grid[:-1]).mean()) < 0.003


def test_temperature_zero_is_the_argmax() -> None:
    batch = logits(rows=4)
    sampled = sample(batch, [row(temperature=0.0)] * 4)
    assert sampled.token_ids == batch.argmax(-1).tolist()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_distribution(temperature: float) -> None:
    batch = logits(1)
    want = (batch[0] / temperature).softmax(-1)
    assert (frequencies(batch, temperature=temperature) - want).abs().max() < 0.015


def test_top_k_top_p_and_min_p_cut_the_tail() -> None:
    batch = logits(2)
    probs, order = batch[0].softmax(-1).sort(descending=True)
    nucleus = int((probs.cumsum(0) - probs < 0.7).sum())
    for params, kept in (
        ({"top_k": 3}, 3),
        ({"top_p": 0.7}, nucleus),
        ({"min_p": 0.2}, int((probs >= 0.2 * probs[0]).sum())),
        ({"top_k": 2, "top_p": 0.999}, 2),
        ({"top_p": 1e-9}, 1),
    ):
        seen = frequencies(batch, **params)
        want = torch.zeros(VOCAB)
        want[order[:kept]] = probs[:kept] / probs[:kept].sum()
        assert (seen - want).abs().max() < 0.015, params
        assert set(seen.nonzero()[:, 0].tolist()) <= set(order[:kept].tolist())


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    batch = logits(3, rows=8)

    def rows() -> list[SampleRow]:
        """Made anew each time: penalties count what was taken."""
        return [
            row(seed=1, position=9, temperature=0.7),
            row(temperature=0.0),
            row(seed=2, position=4, top_k=5),
            row(seed=3, position=1, top_p=0.5, temperature=1.3),
            row(seed=4, repetition_penalty=1.4, prompt=[3, 4], output=[7, 7]),
            row(seed=5, presence_penalty=0.5, frequency_penalty=0.2, output=[7, 7, 8]),
            row(seed=6, logit_bias={4: 3.0, 9: -100.0}),
            row(seed=7, min_tokens=3, stop_token_ids=(2,)),
        ]

    together = sample(batch, rows()).token_ids
    alone = [sample(batch[i : i + 1], rows()[i : i + 1]).token_ids[0] for i in range(8)]
    assert together == alone


def test_penalties_and_bias() -> None:
    flat = torch.zeros(1, VOCAB)
    flat[0, 7], flat[0, 8], flat[0, 9] = 1.0, 0.9, -0.1
    greedy = {"temperature": 0.0}

    def pick(**params: object) -> int:
        given = {name: params.pop(name) for name in ("prompt", "output") if name in params}
        return sample(flat, [row(**given, **greedy, **params)]).token_ids[0]  # type: ignore[arg-type]

    assert pick() == 7
    assert pick(output=[7], presence_penalty=0.5) == 8
    assert pick(output=[7, 7, 7], frequency_penalty=0.05) == 8
    assert pick(output=[7], frequency_penalty=0.05) == 7
    assert pick(prompt=[7], presence_penalty=1.0) == 7, "these penalties are for generated tokens"
    assert pick(prompt=[7], repetition_penalty=2.0) == 8
    assert pick(logit_bias={33: 5.0}) == 33
    assert pick(logit_bias={7: -5.0}) == 8
    assert pick(stop_token_ids=(7,), min_tokens=1) == 8
    assert pick(stop_token_ids=(7,), min_tokens=1, output=[4]) == 7


def test_eos_is_banned_until_the_minimum_length() -> None:
    sure = torch.zeros(1, VOCAB)
    sure[0, 1] = 50.0
    assert sample(sure, [row(min_tokens=2)]).token_ids != [1]
    assert sample(sure, [row(min_tokens=2, output=[5, 6])]).token_ids == [1]
    assert sample(sure, [row(min_tokens=2, ignore_eos=True)]).token_ids == [1]


def processed(batch: torch.Tensor, **params: object) -> tuple[int, float, dict[int, float]]:
    """Token, log-probability, those of all that can come; beside a row that asks for the model's own."""
    rows = [row(logprobs=VOCAB, **params), row(logprobs=VOCAB, processed_logprobs=True, **params)]
    raw, found = sample(batch.expand(2, -1), rows).logprobs
    assert raw is not None
    assert found is not None
    assert dict(raw.top) == pytest.approx(dict(enumerate(batch[0].log_softmax(-1).tolist())), abs=1e-5)
    return found.token_id, found.logprob, dict(found.top)


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0.5},
        {"temperature": 1.7, "top_k": 5},
        {"temperature": 0.8, "top_p": 0.7, "min_p": 0.05},
        {"temperature": 1.3, "top_k": 1},
        {"temperature": 0.9, "top_p": 0.9, "logit_bias": {3: 2.0}},
    ],
)
def test_processed_logprobs_are_of_the_distribution_that_is_drawn_from(params: dict[str, object]) -> None:
    batch = logits(seed=9)
    token, logprob, top = processed(batch, **params)
    assert top[token] == pytest.approx(logprob, abs=1e-5)
    want = frequencies(batch[0], **params)
    assert set(top) >= set(want.nonzero()[:, 0].tolist())  # what can hardly come may not have
    got = torch.tensor([np.exp(top.get(i, -np.inf)) for i in range(VOCAB)])
    assert float(got.sum()) == pytest.approx(1, abs=1e-5)
    assert (got - want).abs().max() < 0.015


def test_processed_logprobs_of_a_greedy_row_are_after_penalties_and_bias() -> None:
    batch = logits(seed=9)
    changes = {"presence_penalty": 1.5, "logit_bias": {3: 2.0}, "prompt": [5], "output": [4]}
    token, logprob, top = processed(batch, temperature=0.0, top_k=3, **changes)
    want = batch[0].clone()
    want[3] += 2.0
    want[4] -= 1.5
    assert token == int(want.argmax())
    assert logprob == pytest.approx(float(want.log_softmax(-1)[token]), abs=1e-5)
    assert top == pytest.approx(dict(enumerate(want.log_softmax(-1).tolist())), abs=1e-5)


def test_logprobs_are_of_the_unmodified_logits() -> None:
    batch = logits(4)
    found = sample(batch, [row(temperature=0.0, logprobs=3, logit_bias={11: 100.0})]).logprobs[0]
    want = batch[0].log_softmax(-1)
    assert found is not None
    assert found.token_id == 11
    assert found.logprob == pytest.approx(float(want[11]), abs=1e-5)
    assert [token for token, _ in found.top] == want.topk(3).indices.tolist()
    assert [value for _, value in found.top] == pytest.approx(want.topk(3).values.tolist(), abs=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_logits_are_told_row_by_row(bad: float) -> None:
    batch = logits(5, rows=3)
    batch[1, 17] = bad
    sampled = sample(batch, [row(temperature=0.0), row(), row(seed=3)])
    assert sampled.finite == [True, False, True]
    good = sample(batch[[0, 2]], [row(temperature=0.0), row(seed=3)])
    assert [sampled.token_ids[0], sampled.token_ids[2]] == good.token_ids


def test_extreme_temperatures_stay_finite() -> None:
    batch = logits(6) * 1e4
    for temperature in (1e-6, 1e6):
        (token,) = sample(batch, [row(temperature=temperature)]).token_ids
        assert 0 <= token < VOCAB


@pytest.mark.parametrize("temperature", [1e-46, 1e-40, 5e-324, 1e-20, 9e-6])
def test_a_temperature_next_to_zero_is_greedy(temperature: float) -> None:
    """In float32 it may be 0, by which the last token of the vocabulary was drawn."""
    batch = logits(7, rows=3)
    asked = [row(seed=i, temperature=temperature, top_p=0.9, top_k=20) for i in range(3)]
    assert sample(batch, asked).token_ids == batch.argmax(-1).tolist()


@pytest.mark.parametrize(
    "params", [{"repetition_penalty": 1e-38}, {"repetition_penalty": 1e-46}, {"logit_bias": {7: 3e38}}]
)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_what_a_processor_made_of_logits_is_looked_at_too(
    params: dict[str, object], temperature: float
) -> None:
    """Row 1 alone overflows: its neighbours have the tokens that they have without it."""
    batch = logits(8, rows=3)
    batch[1, 7] = 3e38

    def rows() -> list[SampleRow]:
        of_all = {
            "temperature": temperature,
            "prompt": [7],
            "repetition_penalty": 1.5,
            "logit_bias": {9: 1.0},
        }
        return [row(seed=i, **of_all | (params if i == 1 else {})) for i in range(3)]  # type: ignore[arg-type]

    sampled = sample(batch, rows())
    assert sampled.finite == [True, False, True]
    alone = sample(batch[[0, 2]], [rows()[0], rows()[2]])
    assert alone.finite == [True, True]
    assert [sampled.token_ids[0], sampled.token_ids[2]] == alone.token_ids


def test_a_token_that_is_banned_may_be_anything() -> None:
    batch = logits(9)
    asked = row(temperature=0.0, min_tokens=2, stop_token_ids=(3,), logit_bias={3: -100.0})
    assert sample(batch, [asked]).finite == [True]


def test_every_option_that_changes_logits_is_one_processor() -> None:
    """Each is wanted by the rows that ask for it and by no others."""
    held = held_to("a")
    asks: list[list[dict[str, object]]] = [
        [{"repetition_penalty": 1.2}, {"presence_penalty": 0.1}, {"frequency_penalty": -0.1}],
        [{"logit_bias": {3: 1.0}}],
        [{"min_tokens": 2}],
        [{"allowed_token_ids": (3,)}],
        [{"bad_words": ((3,), (4, 5))}],
        [{}],
    ]
    for processor, of_it in zip(PROCESSORS, asks, strict=True):
        guide: Any = held if processor is logits_module.Grammar else None
        for params in of_it:
            asking = row(output=[4], **params)
            asking.guide = guide
            assert wanted(asking) == [processor]
    assert wanted(row(output=[4], temperature=0.3, top_k=2, logprobs=3)) == []


def test_what_a_processor_keeps_stays_with_the_sequence() -> None:
    asked, sampler = row(temperature=0.0, logit_bias={33: 50.0}), Sampler(Plain())
    assert sample(logits(), [asked], sampler).token_ids == [33]
    kept = asked.state["logit_bias"]
    assert sample(logits(1), [asked], sampler).token_ids == [33]
    assert asked.state["logit_bias"] is kept


def test_penalties_count_what_was_taken_before_the_host_knows_it() -> None:
    flat, sampler = torch.zeros(2, VOCAB), Sampler(Plain())
    flat[:, 7], flat[:, 8], flat[:, 9] = 1.0, 0.9, 0.8
    greedy = {"temperature": 0.0, "prompt": [3]}
    penalised = row(presence_penalty=0.5, **greedy)
    free = row(**greedy)
    for expected in (7, 8, 9):
        assert sample(flat, [free, penalised], sampler).token_ids == [7, expected]
        penalised.position += 1  # and its tokens are as they were


def test_counts_of_a_sequence_that_ended_are_anothers() -> None:
    flat, sampler = torch.zeros(1, VOCAB), Sampler(Plain())
    flat[0, 7], flat[0, 8] = 1.0, 0.9
    for _ in range(20):
        assert sample(flat, [row(temperature=0.0, presence_penalty=0.5, prompt=[3])], sampler).token_ids == [
            7
        ]
        assert sample(
            flat, [row(temperature=0.0, repetition_penalty=2.0, prompt=[7])], sampler
        ).token_ids == [8]
    (penalties,) = [p for p in sampler._processors if isinstance(p, Penalties)]
    assert penalties._seen is not None
    assert len(penalties._seen._counts) == 4
    together = [row(temperature=0.0, presence_penalty=0.5, prompt=[n]) for n in range(9)]
    assert sample(flat.expand(9, -1), together, sampler).token_ids == [7] * 9
    for asked in together:
        asked.position += 1
    assert sample(flat.expand(9, -1), together, sampler).token_ids == [8] * 9


WORDS = tiny_tokenizer.byte_level()
WIDE = 310  # a little more than the tokenizer has
A, B, C = (WORDS.token_to_id(letter) for letter in "abc")


def held_to(regex: str) -> Matcher:
    return Vocabulary.of(WORDS.to_str(), WIDE, [1]).compile(grammars.of_regex(regex))


@pytest.mark.parametrize("begun", [False, True])
def test_a_grammar_bans_all_other_tokens_of_its_own_rows(begun: bool) -> None:
    rows = [row(temperature=0.0, prompt=[5], output=output) for output in ([], [], [], [A])]
    rows[1].guide, rows[3].guide = held_to("[ab]"), held_to("[ab]c")
    scores = torch.randn(4, WIDE, generator=torch.Generator().manual_seed(0))
    likelier = A if scores[1, A] > scores[1, B] else B
    free = scores.argmax(dim=-1).tolist()
    sampler = Sampler(Plain())
    if begun:
        sampler.begin(sampling_of(rows), WIDE)
    sampled = sample(scores, rows, sampler)
    assert sampled.token_ids == [free[0], likelier, free[2], C]
    assert all(sampled.finite)


def test_masks_that_were_begun_for_other_tokens_are_not_taken() -> None:
    asked, sampler = row(temperature=0.0, output=[]), Sampler(Plain())
    asked.guide = held_to("ab")
    sampler.begin(sampling_of([asked]), WIDE)
    asked.tokens = np.array([A])
    asked.position = 1
    assert sample(torch.zeros(1, WIDE), [asked], sampler).token_ids == [B]


def test_the_end_of_a_grammar_comes_before_the_minimum_length_and_an_error_gives_no_token() -> None:
    rows = [row(temperature=0.0, min_tokens=5, output=[token]) for token in (A, B)]
    rows[0].guide = rows[1].guide = held_to("a")
    sampled = sample(torch.randn(2, WIDE), rows)
    assert (sampled.token_ids[0], sampled.finite) == (1, [True, False])


def test_a_device_unpacks_masks_as_the_host_does() -> None:
    bits = np.random.default_rng(0).integers(0, 256, (3, 8), np.uint8)
    here = logits_module._unpacked(bits, torch.zeros(3, VOCAB))
    shifted = (torch.from_numpy(bits)[:, :, None] >> torch.arange(8, dtype=torch.uint8)) & 1
    assert torch.equal(here, shifted.flatten(1)[:, :VOCAB].bool())
    assert logits_module._unpacked(bits, torch.zeros(3, VOCAB, device="meta")).shape == (3, VOCAB)


def test_allowed_tokens_are_the_only_ones_that_come() -> None:
    batch = logits(3, rows=3)
    asked = [row(temperature=0.0), row(temperature=0.0, allowed_token_ids=(9, 4, 9)), row(seed=1)]
    got = sample(batch, asked)
    assert got.token_ids[1] == max((4, 9), key=lambda token: float(batch[1, token]))
    assert got.token_ids[0] == int(batch[0].argmax())
    drawn = frequencies(batch[0], temperature=2.0, allowed_token_ids=(4, 9))
    assert set(drawn.nonzero()[:, 0].tolist()) == {4, 9}
    both = row(temperature=0.0, allowed_token_ids=(4, 9), logit_bias={4: 100.0, 5: 100.0})
    assert sample(batch[:1], [both]).token_ids == [4]


def test_bad_words_never_come_in_their_order() -> None:
    batch = logits(3)
    best, second, third = batch[0].topk(3).indices.tolist()

    def taken(output: list[int], *words: tuple[int, ...]) -> int:
        return sample(batch, [row(temperature=0.0, prompt=[7], output=output, bad_words=words)]).token_ids[0]

    assert taken([], (best,)) == second
    assert taken([], (best,), (second,)) == third
    assert taken([8, 9], (8, 9, best)) == second
    assert taken([9, 8], (8, 9, best)) == best
    assert taken([9], (7, 9, best)) == best  # the prompt does not count
    assert taken([9], (8, 9, best)) == best
    assert taken([8, 9], (9, 8, best), (9, best)) == second
    assert sampling_of([row(bad_words=((1, 2),))]).must_be_read
