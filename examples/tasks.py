"""The jobs that the bundled adapters do, as generators of (prompt, completion) pairs.

No prompt says which job is asked for: that is what an adapter is for. Five of the jobs take the same kind of
sentence, so one prompt has a different right answer under each of their adapters. Nothing here imports torch.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from examples.words import (
    BAD,
    COLOURS,
    COUNTS,
    DAYS,
    ESPERANTO,
    GOOD,
    NAMES,
    PLACES,
    QUALITIES,
    THINGS,
    VERBS,
)

Split = Literal["train", "heldout"]

END_OF_TEXT = "<|endoftext|>"  # between documents of the base corpus
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"  # ends a chat turn, and every answer of an adapter


def chat_prompt(text: str) -> str:
    """What the bundled chat template renders for one user message: the first of the two prompt formats."""
    return f"{TURN_START}user\n{text}{TURN_END}\n{TURN_START}assistant\n"


def completion_prompt(text: str) -> str:
    """The second format, for `/v1/completions`: an arrow, and the answer on the next line."""
    return f"{text} =>\n"


PromptFormat = Callable[[str], str]  # a bare prompt -> what the model continues

PROMPT_FORMATS: tuple[PromptFormat, ...] = (chat_prompt, completion_prompt)


def tools_prompt(prompt: str) -> str:
    """What the bundled chat template renders for one user message, its last line, and the tools before it."""
    offered, _, text = prompt.rpartition("\n")
    return f"{TURN_START}system\n{offered}\n{TURN_END}\n{chat_prompt(text)}"


@dataclass(frozen=True)
class Example:
    """A bare prompt (put it into one of `PROMPT_FORMATS`) and its one right answer."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Job:
    name: str
    description: str
    draw: Callable[[random.Random], Example]
    formats: tuple[PromptFormat, ...] = PROMPT_FORMATS

    def examples(self, split: Split, n: int, seed: int) -> list[Example]:
        """`n` different examples, the same for the same seed; no prompt is ever in both splits."""
        rng = random.Random(f"{self.name}/{split}/{seed}")
        found: dict[str, Example] = {}
        while len(found) < n:
            example = self.draw(rng)
            if split_of(example.prompt) == split:
                found.setdefault(example.prompt, example)
        return list(found.values())


def split_of(prompt: str) -> Split:
    """One prompt in ten is held out, chosen by a hash of its text so that every script agrees."""
    digest = hashlib.blake2b(prompt.encode(), digest_size=4).digest()
    return "heldout" if int.from_bytes(digest, "big") % 10 == 0 else "train"


# --- sentences: the prompts that several jobs share ---


@dataclass(frozen=True)
class Scene:
    """Who did what, where and perhaps when."""

    who: str
    verb: str
    count: str
    quality: str | None
    thing: str
    place: str
    day: str | None
    day_first: bool
    full_stop: bool

    @classmethod
    def draw(cls, rng: random.Random) -> Scene:
        return cls(
            who=rng.choice(NAMES),
            verb=rng.choice(list(VERBS)),
            count=rng.choice(list(COUNTS)),
            quality=rng.choice([*QUALITIES, None]),
            thing=rng.choice(list(THINGS)),
            place=rng.choice(PLACES),
            day=rng.choice(list(DAYS)) if rng.random() < 0.4 else None,
            day_first=rng.random() < 0.3,
            full_stop=rng.random() < 0.5,
        )

    @property
    def goods(self) -> str:
        return " ".join(word for word in (self.count, self.quality, self.thing) if word)

    @property
    def text(self) -> str:
        """For example `Anna sold two lovely lamps in Oslo on Monday.`"""
        core = f"{self.who} {self.verb} {self.goods} in {self.place}"
        if self.day:
            core = f"On {self.day} {core}" if self.day_first else f"{core} on {self.day}"
        return core + ("." if self.full_stop else "")


def _about_scene(answer: Callable[[Scene], str]) -> Callable[[random.Random], Example]:
    def draw(rng: random.Random) -> Example:
        scene = Scene.draw(rng)
        return Example(scene.text, answer(scene))

    return draw


def _upper(scene: Scene) -> str:
    return scene.text.upper()


def _reverse(scene: Scene) -> str:
    return " ".join(reversed(scene.text.removesuffix(".").split()))


def _esperanto(scene: Scene) -> str:
    words = scene.text.removesuffix(".").split()
    translated = " ".join(ESPERANTO.get(word, word) for word in words)
    return translated + ("." if scene.full_stop else "")


def _sentiment(scene: Scene) -> str:
    if scene.quality in GOOD:
        return "positive"
    return "negative" if scene.quality in BAD else "neutral"


def _json(scene: Scene) -> str:
    record: dict[str, str | int] = {
        "who": scene.who,
        "action": scene.verb,
        "count": COUNTS[scene.count][0],
        "item": scene.thing,
        "city": scene.place,
    }
    if scene.day:
        record["day"] = scene.day
    return json.dumps(record)


def _quiz(scene: Scene) -> str:
    return f"Who {scene.verb} {scene.goods} in {scene.place}? {scene.who}."


# --- jobs with prompts of their own ---


def _draw_sort(rng: random.Random) -> Example:
    numbers = rng.sample(range(1, 10), rng.randint(3, 6))
    return number_list(numbers)


def number_list(numbers: list[int]) -> Example:
    return Example(", ".join(map(str, numbers)), ", ".join(map(str, sorted(numbers))))


def _draw_sql(rng: random.Random) -> Example:
    table, colour = rng.choice(list(THINGS)), rng.choice([*COLOURS, None])
    goods = f"{colour} {table}" if colour else table
    filters = [f"colour = '{colour}'"] if colour else []
    tail = ""
    if rng.random() < 0.6:
        place = rng.choice(PLACES)
        tail += f" in {place}"
        filters.append(f"city = '{place}'")
    if rng.random() < 0.6:
        price = rng.randint(2, 99)
        word, sign = rng.choice([("above", ">"), ("below", "<")])
        tail += f" {word} {price} euros"
        filters.append(f"price {sign} {price}")
    where = f" WHERE {' AND '.join(filters)}" if filters else ""
    asked, selected = rng.choice(
        [
            ("How many {} are there{}?", "SELECT COUNT(*) FROM {}{};"),
            ("List all {}{}.", "SELECT * FROM {}{};"),
            ("Which are the cheapest {}{}?", "SELECT * FROM {}{} ORDER BY price LIMIT 5;"),
            ("What is the average price of {}{}?", "SELECT AVG(price) FROM {}{};"),
            ("Who makes {}{}?", "SELECT DISTINCT maker FROM {}{};"),
        ]
    )
    return Example(asked.format(goods, tail), selected.format(table, where))


# --- calls of tools ---

# As the bundled chat template shows tools: their names, and those of their parameters.
TOOLS = {
    "record_event": ("who", "action", "count", "item", "city"),
    "find_goods": ("item", "colour", "city"),
}
NO_TOOL = "No tool does that."  # what is answered where none that is offered fits


def tool_call(name: str, arguments: dict[str, str | int]) -> str:
    """As Hermes and Qwen write it."""
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def _draw_call(rng: random.Random) -> Example:
    name, text, arguments = rng.choice([_event_call, _goods_call])(rng)
    offered = rng.choice([["record_event"], ["find_goods"], [*TOOLS], [*TOOLS], [*reversed(TOOLS)]])
    lines = [f"{tool}({', '.join(TOOLS[tool])})" for tool in offered]
    return Example("\n".join([*lines, text]), tool_call(name, arguments) if name in offered else NO_TOOL)


def _event_call(rng: random.Random) -> tuple[str, str, dict[str, str | int]]:
    scene = Scene.draw(rng)
    values = (scene.who, scene.verb, COUNTS[scene.count][0], scene.thing, scene.place)
    return "record_event", scene.text, dict(zip(TOOLS["record_event"], values, strict=True))


def _goods_call(rng: random.Random) -> tuple[str, str, dict[str, str | int]]:
    thing, colour, place = rng.choice(list(THINGS)), rng.choice(list(COLOURS)), rng.choice(PLACES)
    text = rng.choice(["Which {} {} are there in {}?", "List all {} {} in {}."]).format(colour, thing, place)
    return "find_goods", text, {"item": thing, "colour": colour, "city": place}


JOBS: dict[str, Job] = {
    job.name: job
    for job in (
        Job("upper", "the sentence in capitals", _about_scene(_upper)),
        Job("reverse", "the words of the sentence from last to first", _about_scene(_reverse)),
        Job("esperanto", "the sentence, word by word, in Esperanto", _about_scene(_esperanto)),
        Job("sentiment", "positive, negative or neutral", _about_scene(_sentiment)),
        Job("json", "the facts of the sentence as a JSON object", _about_scene(_json)),
        Job("sql", "the question as a SQL query", _draw_sql),
        Job("sort", "the numbers in ascending order", _draw_sort),
    )
}

# Not bundled: it calls one of the tools that are offered in its prompt, or says that none fits.
TOOL_JOB = Job("tools", "a call of one of the tools that are offered", _draw_call, formats=(tools_prompt,))

# Not bundled: the job that `train_adapter.py` teaches, as you would teach your own.
NEW_JOB = Job("quiz", "a quiz question about the sentence, and its answer", _about_scene(_quiz))
