"""`POST /v1/completions`."""

from __future__ import annotations

import time
import uuid

import msgspec
from fastapi import APIRouter
from msgspec import UNSET
from starlette.requests import Request
from starlette.responses import Response

from server.api.body import beside_loop, read_body
from server.api.face import Face, face_of
from server.api.generation import Choice, Delta, TokenLogprobs
from server.api.mix import AdapterMix
from server.api.plan import Plan, judge_prompts, output_room, sampling_params, text_options, usage_of
from server.api.replies import Completion, CompletionChoice, CompletionLogprobs
from server.api.schemas import CompletionRequest, parse
from server.api.sse import GenerationResponse
from server.engine.messages import EngineInfo
from server.errors import InvalidRequest
from server.text.tokenizer import Tokenizer

router = APIRouter()

_DEFAULT_MAX_TOKENS = 16  # as in OpenAI's API
_ENCODER = msgspec.json.Encoder()


@router.post("/v1/completions")
async def create_completion(request: Request) -> Response:
    face = face_of(request)
    info = face.require_engine()
    body = await read_body(request, face.settings.max_request_bytes)
    plan = await beside_loop(len(body), lambda: _plan(face, info, body))
    return GenerationResponse(face, request, plan)


def _plan(face: Face, info: EngineInfo, body: bytes) -> Plan:
    asked = parse(CompletionRequest, body, info.max_model_len)
    mix = AdapterMix.of(asked, face.base.name)
    if asked.echo and asked.logprobs is not None:
        raise InvalidRequest(
            "logprobs: not supported together with echo", param="logprobs", code="unsupported"
        )
    prompts = [_encode(face, prompt) for prompt in asked.prompt]
    judge_prompts(prompts, info, asked.n, "prompt")
    sampling = []
    for ids in prompts:
        room = output_room(len(ids), asked.max_tokens, _DEFAULT_MAX_TOKENS, info, "prompt")
        sampling.append(sampling_params(asked, info, room))
    echoes = [_echo(face, prompt, ids) for prompt, ids in zip(asked.prompt, prompts, strict=True)]
    return Plan(
        mix=mix,
        prompts=prompts,
        sampling=sampling,
        n=asked.n,
        text=text_options(asked, face.tokenizer),
        stream=bool(asked.stream),
        reply=CompletionReply(asked, face, echoes if asked.echo else None),
    )


def _encode(face: Face, prompt: str | list[int]) -> list[int]:
    return face.require_tokenizer("prompt").encode(prompt) if isinstance(prompt, str) else prompt


def _echo(face: Face, prompt: str | list[int], ids: list[int]) -> str:
    if isinstance(prompt, str):
        return prompt
    return face.tokenizer.decode(ids) if face.tokenizer else ""


class CompletionReply:
    """OpenAI's shape of a completion, whole or in chunks."""

    def __init__(self, asked: CompletionRequest, face: Face, echoes: list[str] | None) -> None:
        self._asked = asked
        self._tokenizer = face.tokenizer
        self._echoes = echoes
        self._usage_wanted = bool(asked.stream_options and asked.stream_options.include_usage)
        self._model = asked.model or face.base.name
        self._head = Completion(f"cmpl-{uuid.uuid4().hex}", int(time.time()), self._model, None, [])
        if self._usage_wanted:
            self._head.usage = None
        self._choices: list[Choice] = []
        self._kept: list[list[Delta]] = []
        self._started: set[int] = set()

    def start(self, adapter_version: str | None, choices: list[Choice]) -> None:
        self._head.adapter_version = adapter_version
        self._choices = choices
        self._kept = [[] for _ in choices]

    def chunk(self, delta: Delta) -> bytes:
        first = delta.choice.index not in self._started
        told = self._asked.return_token_ids or delta.logprobs or delta.finish_reason
        if not (delta.text or told or first):
            return b""
        self._started.add(delta.choice.index)
        text = self._echo_of(delta.choice) + delta.text if first else delta.text
        self._head.choices = [self._choice(delta.choice, text, [delta], with_prompt=first)]
        return _ENCODER.encode(self._head)

    def usage_chunk(self) -> bytes | None:
        if not self._usage_wanted:
            return None
        usage = usage_of(self._choices)
        return _ENCODER.encode(msgspec.structs.replace(self._head, choices=[], usage=usage))

    def add(self, delta: Delta) -> None:
        self._kept[delta.choice.index].append(delta)

    def body(self) -> bytes:
        choices = [
            self._choice(
                choice, self._echo_of(choice) + "".join(d.text for d in kept), kept, with_prompt=True
            )
            for choice, kept in zip(self._choices, self._kept, strict=True)
        ]
        usage = usage_of(self._choices)
        return _ENCODER.encode(msgspec.structs.replace(self._head, choices=choices, usage=usage))

    def _echo_of(self, choice: Choice) -> str:
        return self._echoes[choice.prompt_index] if self._echoes else ""

    def _choice(
        self, choice: Choice, text: str, deltas: list[Delta], *, with_prompt: bool
    ) -> CompletionChoice:
        made = CompletionChoice(choice.index, text, finish_reason=deltas[-1].finish_reason)
        entries = [entry for delta in deltas for entry in delta.logprobs or ()]
        if entries:
            made.logprobs = _logprobs(self._tokenizer, entries)
        if self._asked.return_token_ids:
            made.token_ids = [token_id for delta in deltas for token_id in delta.token_ids]
            made.prompt_token_ids = choice.request.prompt_token_ids if with_prompt else UNSET
        return made


def _logprobs(tokenizer: Tokenizer | None, entries: list[TokenLogprobs]) -> CompletionLogprobs:
    return CompletionLogprobs(
        tokens=[_name(tokenizer, entry.values.token_id) for entry in entries],
        token_logprobs=[entry.values.logprob for entry in entries],
        top_logprobs=[{_name(tokenizer, i): value for i, value in entry.values.top} for entry in entries],
        text_offset=[entry.text_offset for entry in entries],
    )


def _name(tokenizer: Tokenizer | None, token_id: int) -> str:
    """A token as text; `bytes:\\xe2` where it is a part of a character, so that names do not collide."""
    if tokenizer is None:
        return f"token_id:{token_id}"
    raw = tokenizer.token_bytes(token_id)
    try:
        return raw.decode() if raw else f"token_id:{token_id}"
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
