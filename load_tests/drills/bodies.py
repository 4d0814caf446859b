"""Requests at random for every route of an OpenAPI document: what it allows, what it does not, and neither.

The first two are Schemathesis's (https://schemathesis.readthedocs.io), the third are bodies of theirs with a
value or some bytes changed, so that they are hardly JSON any more. The same seed makes the same requests.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from random import Random
from typing import Any

import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.errors import HypothesisException
from schemathesis import APIOperation, Case, GenerationMode

from load_tests.drills.mutations import damaged_json

_MODES = GenerationMode.POSITIVE, GenerationMode.NEGATIVE
_HERE = "http://server"
_MOST_CHOICES, _MOST_TOKENS = 4, 16  # of most requests, or a run would be all generation
_NAMES = "model", "adapter", "lora_name"


@dataclass(frozen=True)
class Asked:
    """A request. `path` has its query."""

    method: str
    path: str
    headers: dict[str, str]
    content: bytes

    def __str__(self) -> str:
        return f"{self.method} {self.path} {self.content[:300]!r}"


class Bodies:
    """`known`: names that lead somewhere, for most of what would else be a name that nobody knows."""

    def __init__(self, document: dict[str, Any], known: Sequence[str], first_seed: int) -> None:
        schema = schemathesis.openapi.from_dict(document)
        self._operations = [found.ok() for found in schema.get_all_operations()]
        self._known = known
        self._seed = first_seed
        self._random = Random(first_seed)

    def make(self, posts: int) -> Iterator[list[Asked]]:
        """So many for the POST routes together and some for each of the others; by route, some at a time."""
        posted = [each for each in self._operations if each.method.upper() == "POST"]
        share = max(posts // len(posted), 1)
        for operation in self._operations:
            yield from self._of(operation, share if operation in posted else max(share // 20, 2))

    def _of(self, operation: APIOperation, count: int) -> Iterator[list[Asked]]:
        most = 300
        for start in range(0, count, most):
            yield self._some(operation, min(most, count - start))

    def _some(self, operation: APIOperation, count: int) -> list[Asked]:
        """A third each way; where there are not so many, more of the third."""
        made: list[Asked] = []
        for mode in _MODES:
            self._seed += 1
            made += [
                asked
                for case in _cases(operation, mode, -(-count // 3), self._seed)
                if (asked := self._asked(case))
            ]
        made = made[:count]
        whole = made or [Asked(operation.method.upper(), self._path(operation), {}, b"{}")]
        while len(made) < count:
            made.append(self._damaged(self._random.choice(whole)))
        return made

    def _path(self, operation: APIOperation) -> str:
        return str(operation.path).replace("{name}", self._random.choice(self._known))

    def _asked(self, case: Case) -> Asked | None:
        """None for what no client can send."""
        if (
            isinstance(case.path_parameters, dict)
            and "name" in case.path_parameters
            and self._random.random() < 0.7
        ):
            case.path_parameters["name"] = self._random.choice(self._known)
        if isinstance(case.body, dict):
            self._aim(case.body)
        with suppress(ValueError, TypeError, UnicodeError, requests.RequestException):
            kwargs = case.as_transport_kwargs(base_url=_HERE)
            kwargs.pop("cookies", None)
            sent = requests.Request(**{key: kwargs.get(key) for key in _PARTS}).prepare()
            body = sent.body or b""
            content = body.encode() if isinstance(body, str) else bytes(body)
            headers = {name: str(value) for name, value in sent.headers.items() if name.lower() in _KEPT}
            return Asked(str(sent.method), str(sent.url).removeprefix(_HERE), headers, content)
        return None

    def _aim(self, body: dict[str, Any]) -> None:
        for name in _NAMES:
            if isinstance(body.get(name), str) and self._random.random() < 0.7:
                body[name] = self._random.choice(self._known)
        for name, most in (
            ("n", _MOST_CHOICES),
            ("max_tokens", _MOST_TOKENS),
            ("max_completion_tokens", _MOST_TOKENS),
        ):
            value = body.get(name)
            if isinstance(value, int | float) and value > most and self._random.random() < 0.9:
                body[name] = most

    def _damaged(self, asked: Asked) -> Asked:
        content = damaged_json(asked.content or b'{"model": "base"}', self._random)
        headers = {"content-type": "application/json"} | asked.headers
        return Asked(asked.method, asked.path, headers, content)


_PARTS = "method", "url", "headers", "params", "json", "data", "files"
_KEPT = {"content-type"}  # what else Schemathesis sends is its own


def _cases(operation: APIOperation, mode: GenerationMode, count: int, run_seed: int) -> list[Case]:
    """As many as there are, up to a count."""
    made: list[Case] = []

    @seed(run_seed)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(operation.as_strategy(generation_mode=mode))
    def collect(case: Case) -> None:
        made.append(case)

    with suppress(HypothesisException):  # nothing can be wrong where nothing is asked for
        collect()
    return made
