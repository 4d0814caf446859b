"""Text for the base model, made from grammars: stories, chats, lists, word books, records and queries.

It shows the model its vocabulary and how text of each kind looks, always under a heading that says what
kind it is. It never answers a bare prompt with a job's answer: in chats the model only makes conversation.
Pairs shown under a heading come from the training split, so held-out examples stay unseen.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

from examples.tasks import END_OF_TEXT, JOBS, TURN_END, TURN_START, Example, Scene, number_list, split_of
from examples.words import DAYS, ESPERANTO, NAMES, PLACES, QUALITIES, THINGS, VERBS

_ALL_WORDS = [*NAMES, *PLACES, *VERBS, *QUALITIES, *THINGS, *DAYS]

_SENTENCE_JOBS = ["upper", "reverse", "esperanto", "sentiment", "json"]
_HEADINGS = {
    "upper": "Shouted",
    "reverse": "Backwards",
    "esperanto": "Esperanto",
    "sentiment": "Mood",
    "json": "Record",
    "sql": "Query",
    "sort": "In order",
}


def _draw_numbers(rng: random.Random) -> Example:
    """As the job `sort`, but with larger numbers, so that the model meets them all."""
    return number_list(rng.sample(range(1, 100), rng.randint(3, 6)))


_DRAW = {**{name: job.draw for name, job in JOBS.items()}, "sort": _draw_numbers}


def _train_examples(names: list[str], rng: random.Random) -> list[Example]:
    """One example of each job, all of one sentence where the jobs take sentences."""
    while True:
        seed = rng.random()
        examples = [_DRAW[name](random.Random(seed)) for name in names]
        if all(split_of(example.prompt) == "train" for example in examples):
            return examples


def _pairs(rng: random.Random) -> str:
    """A prompt and, each under its heading, what some of the jobs would make of it."""
    names = rng.sample(_SENTENCE_JOBS, rng.randint(1, 4))
    if rng.random() < 0.35:
        names = [rng.choice(["sql", "sort"])]
    examples = _train_examples(names, rng)
    answers = [f"{_HEADINGS[name]}:\n{e.completion}" for name, e in zip(names, examples, strict=True)]
    return "\n".join([f"Given:\n{examples[0].prompt}", *answers])


def _word_book(rng: random.Random) -> str:
    kind = rng.randrange(4)
    if kind == 0:
        lines = [f"{word} = {ESPERANTO[word]}" for word in rng.sample(list(ESPERANTO), 6)]
    elif kind == 1:
        lines = [f"{word} {word.upper()}" for word in rng.sample(_ALL_WORDS, 6)]
    elif kind == 2:
        lines = [f"{past}, to {VERBS[past][0]}" for past in rng.sample(list(VERBS), 4)]
    else:
        word = rng.choice(_ALL_WORDS)
        lines = [f"{word}: {' '.join(word)}", f"{word.upper()}: {' '.join(word.upper())}"]
    return "\n".join(lines)


def _words(rng: random.Random) -> list[str]:
    """Words of any kind, in any order: a list, or a sentence cut into its words."""
    if rng.random() < 0.5:
        return Scene.draw(rng).text.removesuffix(".").split()
    return rng.sample(_ALL_WORDS, rng.randint(3, 10))


def _lists(rng: random.Random) -> str:
    kind = rng.randrange(4)
    if kind == 0:  # the same words again: what teaches a model to copy
        line = " ".join(_words(rng))
        return "\n".join([line] * rng.randint(2, 3))
    if kind == 1:
        words = _words(rng)
        return f"Given:\n{' '.join(words)}\nBackwards:\n{' '.join(reversed(words))}"
    if kind == 2:
        words = _words(rng)
        return f"Given:\n{' '.join(words)}\nShouted:\n{' '.join(words).upper()}"
    numbers = rng.sample(range(1, 100), rng.randint(3, 12))
    return "In order:\n" + ", ".join(map(str, sorted(numbers)))


def _story(rng: random.Random) -> str:
    sentences = []
    for _ in range(rng.randint(1, 3)):
        scene = Scene.draw(rng)
        sentences.append(scene.text.removesuffix(".") + ".")
        infinitive = VERBS[scene.verb][0]
        sentences.append(
            rng.choice(
                [
                    f"{rng.choice(NAMES)} did not {infinitive} {scene.thing}.",
                    f"The {scene.goods} were for {rng.choice(NAMES)}.",
                    f"{scene.who} likes {scene.place}.",
                    f"{rng.choice(NAMES)} asked: who {scene.verb} the {scene.thing}? It was {scene.who}.",
                ]
            )
        )
    return " ".join(sentences)


def _reply(prompt: str, scene: Scene, rng: random.Random) -> str:
    """Small talk about what was said; for questions and lists, a polite way out."""
    if prompt != scene.text:
        return rng.choice(["I am not sure.", "Let me think about it.", "I cannot tell you that yet."])
    infinitive = VERBS[scene.verb][0]
    return rng.choice(
        [
            f"Why did {scene.who} {infinitive} them in {scene.place}?",
            f"I hope {scene.who} likes {scene.thing}.",
            f"How nice of {scene.who}. Tell me more about the {scene.thing}.",
        ]
    )


def _said(rng: random.Random) -> tuple[str, Scene]:
    scene = Scene.draw(rng)
    choice = rng.random()
    if choice < 0.6:
        return scene.text, scene
    if choice < 0.8:
        return _DRAW["sql"](rng).prompt, scene
    return _DRAW["sort"](rng).prompt, scene


def _chat(rng: random.Random) -> str:
    turns = []
    if rng.random() < 0.2:
        turns.append(f"{TURN_START}system\nYou are a helpful assistant.{TURN_END}")
    if rng.random() < 0.3:
        name = rng.choice(NAMES)
        greeting, answer = rng.choice(
            [
                (f"Hello, I am {name}.", f"Hello {name}! What happened?"),
                ("Hello!", "Hello! What happened?"),
                ("Who are you?", "I am a small model that likes to listen."),
            ]
        )
        turns.append(f"{TURN_START}user\n{greeting}{TURN_END}")
        turns.append(f"{TURN_START}assistant\n{answer}{TURN_END}")
    for _ in range(rng.randint(1, 2)):
        prompt, scene = _said(rng)
        turns.append(f"{TURN_START}user\n{prompt}{TURN_END}")
        turns.append(f"{TURN_START}assistant\n{_reply(prompt, scene, rng)}{TURN_END}")
    return "\n".join(turns)


def _arrow(rng: random.Random) -> str:
    """The completion format with small talk behind the arrow."""
    prompt, scene = _said(rng)
    return f"{prompt} =>\n{_reply(prompt, scene, rng)}{TURN_END}"


_KINDS: list[tuple[Callable[[random.Random], str], float]] = [
    (_pairs, 0.5),
    (_lists, 0.25),
    (_word_book, 0.08),
    (_story, 0.04),
    (_chat, 0.07),
    (_arrow, 0.06),
]


def drills(seed: int) -> Iterator[str]:
    """An endless stream of documents with one lesson: what was said before is said again.

    Three lines of the same random words: as they are, shouted or in Esperanto.
    """
    rng = random.Random(f"drills/{seed}")
    while True:
        kind = rng.random()
        words = rng.choices(_ALL_WORDS if kind < 0.9 else list(ESPERANTO), k=rng.randint(4, 12))
        lines = [words] * 3
        if kind >= 0.9:
            lines[1] = [ESPERANTO[word] for word in words]
        elif kind >= 0.5:
            lines = [rng.choice([words, [word.upper() for word in words]]) for _ in range(3)]
        yield "\n".join(" ".join(line) for line in lines) + END_OF_TEXT


def documents(seed: int) -> Iterator[str]:
    """An endless, reproducible stream of documents, each ended by `END_OF_TEXT`."""
    rng = random.Random(f"corpus/{seed}")
    kinds, weights = zip(*_KINDS, strict=True)
    while True:
        (kind,) = rng.choices(kinds, weights)
        yield kind(rng) + END_OF_TEXT
