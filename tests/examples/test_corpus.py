"""The base model's text: reproducible, and silent about held-out answers."""

from __future__ import annotations

from itertools import islice

from examples import corpus
from examples.tasks import END_OF_TEXT, JOBS, TURN_START, split_of


def documents(n, seed=0):
    return list(islice(corpus.documents(seed), n))


def test_same_seed_same_text():
    assert documents(200, seed=1) == documents(200, seed=1)
    assert documents(200, seed=1) != documents(200, seed=2)


def test_every_document_ends_once():
    assert all(text.endswith(END_OF_TEXT) and text.count(END_OF_TEXT) == 1 for text in documents(500))


def test_pairs_under_a_heading_are_from_the_training_split():
    # a list under the same heading may be any words: it is no prompt of a job unless a job's answer follows
    prompts = [
        text.splitlines()[1]
        for text in documents(3000)
        if text.startswith("Given:\n") and not text.splitlines()[2].startswith(("Shouted", "Backwards"))
    ]
    assert len(prompts) > 500
    assert {split_of(prompt) for prompt in prompts} == {"train"}


def test_chats_make_conversation_and_never_do_a_job():
    chats = [text for text in documents(3000) if text.startswith(TURN_START)]
    assert len(chats) > 100
    answers = {
        example.completion for job in JOBS.values() for example in job.examples("train", 500, seed=0)
    } | {"positive", "negative", "neutral"}
    for chat in chats:
        turns = [turn for turn in chat.split(TURN_START) if turn.startswith("assistant")]
        assert turns
        for turn in turns:
            said = turn.removeprefix("assistant\n").split("<|im_end|>")[0]
            assert said not in answers
            assert "SELECT" not in said
            assert "{" not in said
            assert said != said.upper()
