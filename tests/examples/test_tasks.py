"""The generators: reproducible, split cleanly, and right by rules written a second time here."""

from __future__ import annotations

import json
import random
import subprocess
import sys

import pytest

from examples.tasks import (
    JOBS,
    NEW_JOB,
    NO_TOOL,
    TOOL_JOB,
    TOOLS,
    chat_prompt,
    completion_prompt,
    split_of,
    tools_prompt,
)
from examples.training import BASE_MODEL
from examples.words import ESPERANTO, THINGS
from server.text.chat_template import ChatTemplate

ALL_JOBS = [*JOBS.values(), NEW_JOB, TOOL_JOB]
SHARED = ["upper", "reverse", "esperanto", "sentiment", "json"]


@pytest.mark.parametrize("job", ALL_JOBS, ids=lambda job: job.name)
def test_same_seed_same_examples_and_another_seed_others(job):
    assert job.examples("train", 50, seed=3) == job.examples("train", 50, seed=3)
    assert job.examples("train", 50, seed=3) != job.examples("train", 50, seed=4)


@pytest.mark.parametrize("job", ALL_JOBS, ids=lambda job: job.name)
def test_splits_never_share_a_prompt(job):
    train = {example.prompt for example in job.examples("train", 2000, seed=0)}
    heldout = {example.prompt for example in job.examples("heldout", 300, seed=0)}
    assert len(train) == 2000
    assert len(heldout) == 300
    assert not train & heldout
    assert {split_of(prompt) for prompt in heldout} == {"heldout"}


def test_one_prompt_has_a_different_answer_under_each_of_five_jobs():
    # the shared jobs draw the same kind of sentence, so the same random state gives the same prompt
    examples = [JOBS[name].draw(random.Random(7)) for name in SHARED]
    assert len({example.prompt for example in examples}) == 1
    assert len({example.completion for example in examples}) == len(SHARED)


def test_upper_is_the_prompt_in_capitals():
    for example in JOBS["upper"].examples("heldout", 50, seed=0):
        assert example.completion == example.prompt.upper()


def test_reverse_has_the_same_words_from_last_to_first():
    for example in JOBS["reverse"].examples("heldout", 50, seed=0):
        assert example.completion.split() == example.prompt.rstrip(".").split()[::-1]


def test_esperanto_goes_word_by_word_and_leaves_no_english_thing():
    for example in JOBS["esperanto"].examples("heldout", 50, seed=0):
        assert len(example.completion.split()) == len(example.prompt.split())
        assert not set(THINGS) & set(example.completion.rstrip(".").split())
    assert len(set(ESPERANTO.values())) == len(ESPERANTO)


def test_sentiment_shows_all_three_answers():
    answers = {example.completion for example in JOBS["sentiment"].examples("heldout", 100, seed=0)}
    assert answers == {"positive", "negative", "neutral"}


def test_json_parses_and_holds_words_of_the_sentence():
    for example in JOBS["json"].examples("heldout", 50, seed=0):
        record = json.loads(example.completion)
        assert record.keys() - {"day"} == {"who", "action", "count", "item", "city"}
        assert isinstance(record.pop("count"), int)
        assert all(word in example.prompt for word in record.values())


def test_sql_filters_by_every_word_of_the_question():
    for example in JOBS["sql"].examples("heldout", 100, seed=0):
        assert example.completion.startswith("SELECT ")
        assert example.completion.endswith(";")
        assert ("euros" in example.prompt) == ("price " in example.completion.partition(" ORDER BY")[0])
        assert (" in " in example.prompt) == ("city = " in example.completion)


def test_sort_is_ascending_and_keeps_every_number():
    for example in JOBS["sort"].examples("heldout", 50, seed=0):
        numbers = [int(number) for number in example.completion.split(", ")]
        assert numbers == sorted(map(int, example.prompt.split(", ")))


def test_prompt_formats():
    assert completion_prompt("Hello") == "Hello =>\n"
    assert chat_prompt("Hello") == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"


def test_generators_need_no_torch():
    code = "import sys, examples.corpus, examples.tasks; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_calls_are_of_tools_that_are_offered_and_the_template_shows_them():
    template = ChatTemplate.load(BASE_MODEL, {})
    for example in TOOL_JOB.examples("heldout", 50, seed=0):
        *offered, text = example.prompt.split("\n")
        names = [line.split("(")[0] for line in offered]
        if example.completion != NO_TOOL:
            call = json.loads(example.completion.removeprefix("<tool_call>").removesuffix("</tool_call>"))
            assert call["name"] in names
            assert tuple(call["arguments"]) == TOOLS[call["name"]]
        tools = [
            {"function": {"name": name, "parameters": {"properties": {key: {} for key in TOOLS[name]}}}}
            for name in names
        ]
        rendered = template.render([{"role": "user", "content": text}], given={"tools": tools})
        assert rendered == tools_prompt(example.prompt)
