"""`POST /v1/chat/completions`."""

from __future__ import annotations

import time
import uuid

import msgspec
from fastapi import APIRouter
from msgspec import UNSET, UnsetType
from starlette.requests import Request
from starlette.responses import Response

from server.api.body import beside_loop, read_body
from server.api.face import Face, face_of
from server.api.generation import Choice, Delta, TokenLogprobs
from server.api.mix import AdapterMix
from server.api.plan import Plan, judge_prompts, output_room, sampling_params, text_options, usage_of
from server.api.replies import (
    Chat,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatDelta,
    ChatLogprob,
    ChatLogprobs,
    ChatMessage,
    TopLogprob,
)
from server.api.schemas import ChatRequest, Message, parse
from server.api.sse import GenerationResponse
from server.engine.messages import EngineInfo
from server.errors import InvalidRequest
from server.text.tokenizer import Tokenizer

router = APIRouter()

_ENCODER = msgspec.json.Encoder()


@router.post("/v1/chat/completions")
async def create_chat_completion(request: Request) -> Response:
    face = face_of(request)
    info = face.require_engine()
    body = await read_body(request, face.settings.max_request_bytes)
    plan = await beside_loop(len(body), lambda: _plan(face, info, body))
    return GenerationResponse(face, request, plan)


def _plan(face: Face, info: EngineInfo, body: bytes) -> Plan:
    asked = parse(ChatRequest, body, info.max_model_len)
    mix = AdapterMix.of(asked, face.base.name)
    if asked.top_logprobs is not None and not asked.logprobs:
        raise InvalidRequest("top_logprobs: needs logprobs to be true", param="top_logprobs")
    prompt = chat_prompt(face, asked.messages, asked.chat_template_kwargs)
    judge_prompts([prompt], info, asked.n, "messages")
    room = output_room(len(prompt), _max_tokens(asked), None, info, "messages")
    return Plan(
        mix=mix,
        prompts=[prompt],
        sampling=[sampling_params(asked, info, room)],
        n=asked.n,
        text=text_options(asked, face.tokenizer),
        stream=bool(asked.stream),
        reply=ChatReply(asked, face),
    )


def chat_prompt(
    face: Face, messages: list[Message], options: dict[str, str | int | float | bool | None] | None = None
) -> list[int]:
    """Token ids of a chat. Raises InvalidRequest where the model has no tokenizer or no template."""
    tokenizer = face.require_tokenizer("messages")
    if face.template is None:
        raise InvalidRequest("messages: this server's model has no chat template", param="messages")
    text = face.template.render([message.for_template() for message in messages], **(options or {}))
    return tokenizer.encode_chat(text)


def _max_tokens(asked: ChatRequest) -> int | None:
    if asked.max_completion_tokens is None:
        return asked.max_tokens
    if asked.max_tokens not in (None, asked.max_completion_tokens):
        raise InvalidRequest("max_tokens: differs from max_completion_tokens", param="max_tokens")
    return asked.max_completion_tokens


class ChatReply:
    """OpenAI's shape of a chat completion, whole or in chunks."""

    def __init__(self, asked: ChatRequest, face: Face) -> None:
        self._asked = asked
        self._tokenizer = face.tokenizer
        self._usage_wanted = bool(asked.stream_options and asked.stream_options.include_usage)
        self._head = ChatChunk(
            id=f"chatcmpl-{uuid.uuid4().hex}",
            created=int(time.time()),
            model=asked.model or face.base.name,
            adapter_version=None,
            choices=[],
            usage=None if self._usage_wanted else UNSET,
        )
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
        role: str | UnsetType = "assistant" if first else UNSET
        chunk = ChatChunkChoice(
            index=delta.choice.index,
            delta=ChatDelta(role=role, content=delta.text if delta.text or first else UNSET),
            logprobs=self._logprobs([delta]),
            finish_reason=delta.finish_reason,
        )
        if self._asked.return_token_ids:
            chunk.token_ids = delta.token_ids
            chunk.prompt_token_ids = delta.choice.request.prompt_token_ids if first else UNSET
        self._head.choices = [chunk]
        return _ENCODER.encode(self._head)

    def usage_chunk(self) -> bytes | None:
        if not self._usage_wanted:
            return None
        usage = usage_of(self._choices)
        return _ENCODER.encode(msgspec.structs.replace(self._head, choices=[], usage=usage))

    def add(self, delta: Delta) -> None:
        self._kept[delta.choice.index].append(delta)

    def body(self) -> bytes:
        head = self._head
        choices = [self._choice(c, kept) for c, kept in zip(self._choices, self._kept, strict=True)]
        usage = usage_of(self._choices)
        return _ENCODER.encode(Chat(head.id, head.created, head.model, head.adapter_version, choices, usage))

    def _choice(self, choice: Choice, deltas: list[Delta]) -> ChatChoice:
        made = ChatChoice(
            index=choice.index,
            message=ChatMessage("".join(delta.text for delta in deltas)),
            logprobs=self._logprobs(deltas),
            finish_reason=choice.finish_reason,
        )
        if self._asked.return_token_ids:
            made.token_ids = [token_id for delta in deltas for token_id in delta.token_ids]
            made.prompt_token_ids = choice.request.prompt_token_ids
        return made

    def _logprobs(self, deltas: list[Delta]) -> ChatLogprobs | None:
        entries = [entry for delta in deltas for entry in delta.logprobs or ()]
        return ChatLogprobs([_logprob(self._tokenizer, entry) for entry in entries]) if entries else None


def _logprob(tokenizer: Tokenizer | None, entry: TokenLogprobs) -> ChatLogprob:
    raw = tokenizer.token_bytes(entry.values.token_id) if tokenizer else b""
    top = []
    for token_id, value in entry.values.top:
        top_raw = tokenizer.token_bytes(token_id) if tokenizer else b""
        top.append(TopLogprob(top_raw.decode(errors="replace"), value, list(top_raw)))
    return ChatLogprob(raw.decode(errors="replace"), entry.values.logprob, list(raw), top)
