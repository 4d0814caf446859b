"""Requests that say in several ways what may come: a grammar beside tokens, words and lengths, and what is
told of probabilities there."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from server.guidance import grammars
from server.messages import ErrorCode, Fork, Request
from tests.engine.harness import assert_at_rest, greedy, make_engine, run, tokens_of
from tests.engine.prompt_scores import assert_right, scores_of
from tests.engine.test_guides import PROMPT, WORD, guided, text_of
from tests.model.tiny_models import build
from tests.text import tiny_tokenizer

pytestmark = pytest.mark.usefixtures("runs_beside_host")

TOKENIZER = tiny_tokenizer.byte_level()
A, B, C = (TOKENIZER.token_to_id(letter) for letter in "abc")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("narrowed") / "model"
    build("llama", folder, vocab_size=310, eos_token_id=tiny_tokenizer.EOS)
    return tiny_tokenizer.write(folder)


def test_a_grammar_within_what_else_is_allowed(model: Path) -> None:
    engine = make_engine(model)
    for k in range(6):
        engine.add(guided(f"few{k}", grammars.of_regex(WORD), seed=k, allowed_token_ids=(A, B, 50)))
        engine.add(guided(f"never{k}", grammars.of_regex("[a-c]{30}"), 60, seed=k, bad_words=((A, B), (C,))))
    outputs = run(engine)
    for k in range(6):
        assert re.fullmatch("[ab]{8}", text_of(outputs[f"few{k}"]))
        assert re.fullmatch("b*a*", text_of(outputs[f"never{k}"]))
    assert_at_rest(engine)
    engine.close()


@pytest.mark.parametrize(
    ("regex", "sampling", "want"),
    [
        ("ab?", {"allowed_token_ids": (A,)}, "a"),
        ("ab?", {"bad_words": ((B,),)}, "a"),
        ("a(bc)?", {"bad_words": ((A, B),), "min_tokens": 9}, "a"),
        ("abc", {"bad_words": ((tiny_tokenizer.EOS,),), "allowed_token_ids": (A, B, C)}, "abc"),
    ],
)
def test_where_nothing_else_is_left_a_form_ends_if_it_can(
    model: Path, regex: str, sampling: dict[str, object], want: str
) -> None:
    engine = make_engine(model)
    engine.add(guided("r", grammars.of_regex(regex), **sampling))
    outputs = run(engine)["r"]
    assert text_of(outputs) == want
    assert outputs[-1].finish_reason == "stop"
    engine.close()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    ("sampling", "fields"),
    [
        ({"grammar": "[a-c]{8}", "allowed_token_ids": (50, 51)}, "allowed_token_ids, the grammar"),
        ({"grammar": "a[bc]", "bad_words": ((A, B), (C,))}, "bad_words, the grammar"),
        (
            {"grammar": "abc", "allowed_token_ids": (A,), "bad_words": ((B,),), "min_tokens": 2},
            "allowed_token_ids, bad_words, min_tokens, the grammar",
        ),
        ({"allowed_token_ids": (A, B), "bad_words": ((A,), (B,))}, "allowed_token_ids, bad_words"),
        ({"allowed_token_ids": (1,), "min_tokens": 2}, "allowed_token_ids, min_tokens"),
        ({"bad_words": tuple((token,) for token in range(310))}, "bad_words"),
    ],
)
def test_where_no_token_is_left_the_request_ends_alone_and_says_why(
    model: Path, sampling: dict[str, object], fields: str, temperature: float
) -> None:
    if "grammar" in sampling:
        sampling = sampling | {"grammar": grammars.of_regex(str(sampling["grammar"]))}
    engine = make_engine(model)
    engine.add(greedy("none", PROMPT, 20, **{"ignore_eos": False, "temperature": temperature} | sampling))
    engine.add(guided("good", grammars.of_regex(WORD)))
    engine.add(greedy("free", PROMPT, 20))
    outputs = run(engine)
    assert (outputs["none"][-1].error, outputs["none"][-1].message) == (ErrorCode.NO_TOKEN_LEFT, fields)
    assert re.fullmatch(WORD, text_of(outputs["good"]))
    assert len(tokens_of(outputs["free"])) == 20
    assert_at_rest(engine)
    engine.close()


def test_processed_log_probabilities_are_of_what_the_grammar_allows(model: Path) -> None:
    engine = make_engine(model)
    asked = {"logprobs": 5, "temperature": 0.7}
    engine.add(guided("raw", grammars.of_regex(WORD), **asked))
    engine.add(guided("processed", grammars.of_regex(WORD), processed_logprobs=True, **asked))
    outputs = run(engine)
    assert tokens_of(outputs["raw"]) == tokens_of(outputs["processed"])
    raw, processed = (
        [entry for output in outputs[name] for entry in output.logprobs or []]
        for name in ("raw", "processed")
    )
    letters = [re.fullmatch("[a-c]+", TOKENIZER.decode([entry.token_id])) for entry in processed]
    assert letters[:-1].count(None) == 0
    for plain, held in zip(raw, processed, strict=True):
        assert held.logprob > plain.logprob
        assert len(plain.top) == 5
        assert sum(math.exp(value) for _, value in held.top) == pytest.approx(1, abs=1e-4)
    assert processed[-1].logprob == 0.0  # the end alone may come
    engine.close()


def test_the_prompts_log_probabilities_beside_a_guided_output(model: Path) -> None:
    engine = make_engine(model, max_num_batched_tokens=16)
    sampling = guided("", grammars.of_regex(WORD), prompt_logprobs=3, logprobs=1).sampling
    prompt = [5 + k for k in range(40)]
    request = Request("r", prompt, sampling, forks=(Fork("fork", seed=2),))
    engine.add(request)
    engine.add(guided("beside", grammars.of_regex(WORD)))
    outputs = run(engine)
    assert_right(model, request, scores_of(outputs["r"]))
    for name in ("r", "fork", "beside"):
        words = [output for output in outputs[name] if output.token_ids]
        assert re.fullmatch(WORD, text_of(words))
    assert not any(output.prompt_logprobs for output in outputs["fork"])
    assert_at_rest(engine)
    engine.close()


def test_a_salt_parts_prefixes_of_guided_requests(model: Path) -> None:
    """What they say is the same, and the grammar is compiled once."""
    engine, prompt = make_engine(model), [5 + k for k in range(64)]
    sampling = guided("", grammars.of_regex(WORD), seed=3).sampling
    cached = []
    for at, salt in enumerate(("a", "b", "a", "")):
        engine.add(Request(f"r{at}", prompt, sampling, cache_salt=salt))
        outputs = run(engine)[f"r{at}"]
        cached.append(next(output.cached_tokens for output in outputs))
        assert re.fullmatch(WORD, text_of(outputs))
    assert [bool(tokens) for tokens in cached] == [False, False, True, False]
    assert_at_rest(engine)
    engine.close()
