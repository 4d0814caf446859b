"""Outputs held to grammars in a whole engine, beside others that are not."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from server.engine.engine import Engine
from server.errors import InvalidGrammar
from server.guidance import grammars
from server.messages import ErrorCode, Fork, Request, SamplingParams
from tests.engine.harness import adapter_ref, assert_at_rest, greedy, make_engine, run, tokens_of
from tests.model.tiny_models import add_adapter, build, targets_of
from tests.text import tiny_tokenizer

pytestmark = pytest.mark.usefixtures("runs_beside_host")

WORD = "[a-c]{8}"
PROMPT = [5, 6, 7, 8]
SCHEMA = {"type": "object", "properties": {"a": {"enum": ["bb", "c"]}}, "required": ["a"]}
MADE = grammars.of_schema(json.dumps(SCHEMA | {"additionalProperties": False}), whitespace="")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights, whose free text is noise; 310 tokens, of which the tokenizer has 300."""
    folder = tmp_path_factory.mktemp("guided") / "model"
    build("llama", folder, vocab_size=310, eos_token_id=tiny_tokenizer.EOS)
    return tiny_tokenizer.write(folder)


def guided(name: str, grammar: str, tokens: int = 40, **sampling: object) -> Request:
    options = {"temperature": 1.0, "seed": 1, "ignore_eos": False, "grammar": grammar} | sampling
    return greedy(name, PROMPT, tokens, **options)


def text_of(outputs: list) -> str:
    assert outputs[-1].error is None, outputs[-1].message
    return tiny_tokenizer.byte_level().decode(tokens_of(outputs))


def answers(engine: Engine, *requests: Request) -> dict[str, str]:
    for request in requests:
        engine.add(request)
    outputs = run(engine)
    assert_at_rest(engine)
    engine.close()
    return {name: text_of(of) for name, of in outputs.items()}


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.0}, {"top_k": 3, "presence_penalty": 2.0}])
def test_the_output_is_what_the_grammar_says_and_then_ends(model: Path, sampling: dict[str, object]) -> None:
    engine = make_engine(model)
    requests = [guided(f"r{k}", grammars.of_regex(WORD), seed=k, **sampling) for k in range(4)]
    for text in answers(engine, *requests, guided("json", MADE, **sampling)).values():
        assert re.fullmatch(WORD, text) or text in ('{"a":"bb"}', '{"a":"c"}')


def test_who_is_free_gets_the_same_tokens_beside_guided_ones(model: Path, tmp_path: Path) -> None:
    adapter = add_adapter(model, tmp_path / "a", seed=1, rank=4, target_modules=targets_of("llama"))
    free = [greedy(f"free{k}", [*PROMPT, k], 20, [adapter_ref(adapter)] if k % 2 else []) for k in range(4)]
    alone = answers(make_engine(model), *free)
    beside = make_engine(model)
    held = [
        Request(
            f"g{k}", PROMPT, guided("", grammars.of_regex(WORD), seed=k).sampling, (adapter_ref(adapter),)
        )
        for k in range(4)
    ]
    mixed = answers(beside, *free, *held)
    assert {name: mixed[name] for name in alone} == alone
    assert all(re.fullmatch(WORD, mixed[f"g{k}"]) for k in range(4))


def test_choices_have_matchers_of_their_own(model: Path) -> None:
    forks = tuple(Fork(f"c{k}", seed=k) for k in range(1, 8))
    request = guided("c0", grammars.of_regex(WORD), seed=0)
    many = Request("c0", request.prompt_token_ids, request.sampling, forks=forks)
    alone = answers(make_engine(model), *(guided(f"c{k}", grammars.of_regex(WORD), seed=k) for k in range(8)))
    assert answers(make_engine(model), many) == alone
    assert len(set(alone.values())) > 4


def test_preemption_takes_the_matcher_up_where_it_was(model: Path) -> None:
    requests = [guided(f"r{k}", grammars.of_regex("[a-c]{60}"), 80, seed=k) for k in range(6)]
    calm = answers(make_engine(model), *requests)
    tight = make_engine(model, kv_cache_bytes=48 * 2**10, block_size=4, prefix_caching=False)
    for request in requests:
        tight.add(request)
    outputs = run(tight)
    assert tight.stats().preemptions > 0
    assert {name: text_of(of) for name, of in outputs.items()} == calm
    tight.close()


def test_state_that_was_dropped_is_made_again(model: Path) -> None:
    """As after a step that ran out of memory (`Scheduler.make_way`)."""
    calm = answers(make_engine(model), guided("r", grammars.of_regex("[a-c]{20}")))
    engine = make_engine(model)
    engine.add(guided("r", grammars.of_regex("[a-c]{20}")))
    outputs = []
    for _ in range(10_000):
        if engine.idle_ms() is None:
            break
        if engine.idle_ms():
            engine.wait(1)
        outputs += engine.step()[0]
        for seq in engine._scheduler._sequences.values():
            seq.logits_state.clear()
    assert text_of(outputs) == calm["r"]
    engine.close()


def test_it_ends_by_length_and_by_its_grammar_before_min_tokens(model: Path) -> None:
    engine = make_engine(model)
    engine.add(guided("cut", grammars.of_regex("[a-c]{50}"), 10))
    engine.add(guided("short", grammars.of_regex("[a-c]{3}"), 30, min_tokens=20))
    engine.add(guided("long", grammars.of_regex("[a-c]*"), 30, min_tokens=20))
    engine.add(guided("on", grammars.of_regex("[a-c]{3}"), 30, ignore_eos=True))
    bias = {tiny_tokenizer.byte_level().token_to_id("b"): 100.0, 9: 100.0}
    engine.add(guided("biased", grammars.of_regex("[a-c]{5}"), logit_bias=bias, temperature=0.0))
    outputs = run(engine)
    assert re.fullmatch("[a-c]{10,}", text_of(outputs["cut"]))
    assert outputs["cut"][-1].finish_reason == "length"
    assert re.fullmatch("[a-c]{3}", text_of(outputs["short"]))
    assert outputs["short"][-1].finish_reason == outputs["on"][-1].finish_reason == "stop"
    assert len(tokens_of(outputs["long"])) >= 20
    assert re.fullmatch("[a-c]{3}", text_of(outputs["on"]))
    assert text_of(outputs["biased"]) == "bbbbb"
    engine.close()


def test_log_probabilities_are_of_the_unmasked_logits(model: Path) -> None:
    engine = make_engine(model)
    engine.add(guided("r", grammars.of_choice(["abc"]), temperature=0.0, logprobs=3))
    (first, *_) = [found for output in run(engine)["r"] for found in output.logprobs or []]
    assert first.top[0][1] > first.logprob  # noise would have come first
    engine.close()


@pytest.mark.parametrize(
    ("regex", "reason"),
    [("((", "unclosed group"), ("aaaa(((a{1000}){1000}){1000})", "")],
    ids=["wrong", "bomb"],
)
def test_a_grammar_that_fails_at_first_or_on_the_way_ends_its_request_alone(
    model: Path, regex: str, reason: str
) -> None:
    engine = make_engine(model)
    engine.add(guided("bad", grammars.of_regex(regex)))
    engine.add(guided("good", grammars.of_regex(WORD)))
    outputs = run(engine)
    assert outputs["bad"][-1].error is ErrorCode.GRAMMAR
    assert reason in outputs["bad"][-1].message
    assert re.fullmatch(WORD, text_of(outputs["good"]))
    assert_at_rest(engine)
    engine.close()


def test_requests_that_wait_for_their_grammar_can_be_aborted(model: Path) -> None:
    engine = make_engine(model)
    forks = (Fork("c1", seed=1), Fork("c2", seed=2))
    sampling = SamplingParams(40, temperature=0.0, grammar=grammars.of_regex(WORD))
    engine.add(Request("c0", PROMPT, sampling, forks=forks))
    assert engine.stats().waiting == 3
    engine.abort(["c0", "c1"])
    outputs = run(engine)
    assert set(outputs) == {"c2"}
    assert re.fullmatch(WORD, text_of(outputs["c2"]))
    assert_at_rest(engine)
    engine.close()


def test_a_model_without_a_tokenizer_says_so(tmp_path: Path) -> None:
    engine = make_engine(build("llama", tmp_path))
    engine.add(guided("r", grammars.of_regex(WORD)))
    (output,) = run(engine)["r"]
    assert (output.error, output.message) == (ErrorCode.GRAMMAR, "the model has no tokenizer")
    engine.close()


def test_what_the_library_raises_is_told_too(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("server.engine.guides.Vocabulary.compile", fails)
    engine = make_engine(model)
    engine.add(guided("r", grammars.of_regex(WORD)))
    (output,) = run(engine)["r"]
    assert output.error is ErrorCode.GRAMMAR
    engine.close()


def test_an_equal_grammar_is_compiled_once(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(model)
    engine.add(guided("first", grammars.of_regex(WORD)))
    run(engine)

    def never(*_: object) -> None:
        raise InvalidGrammar("compiled again")

    monkeypatch.setattr("server.engine.guides.Vocabulary.compile", never)
    engine.add(guided("second", grammars.of_regex(WORD)))
    assert re.fullmatch(WORD, text_of(run(engine)["second"]))
    engine.close()
