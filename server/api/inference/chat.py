"""`POST /v1/chat/completions`."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
from fastapi import APIRouter
from msgspec import UNSET, UnsetType
from starlette.requests import Request
from starlette.responses import Response

from server.api.face import Face
from server.api.inference.generation import Choice, Delta, TokenLogprobs
from server.api.inference.mix import AdapterMix
from server.api.inference.replies import (
    Answer,
    Chat,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
)
from server.api.inference.reply import AnyChoice, Piece, Reply
from server.api.inference.schemas import ChatRequest
from server.api.inference.spec import (
    GenerationSpec,
    judge_logprobs,
    judge_stream,
    logprobs_room,
    output_room,
    sampling_params,
    text_options,
)
from server.api.inference.sse import generate
from server.api.operation import Operation
from server.errors import InvalidRequest
from server.messages import EngineInfo

router = APIRouter()


@router.post("/v1/chat/completions")
@Operation({200: Chat}, ChatRequest, chunk=ChatChunk, counted=True, scopes=("infer",))
async def create_chat_completion(request: Request) -> Response:
    return await generate(request, _spec)


async def _spec(face: Face, info: EngineInfo, body: bytes) -> GenerationSpec:
    reading = await face.readers.chat(body, info)
    request, prompts = reading.request, reading.prompts
    mix = AdapterMix.of(request, face.base.name)
    judge_stream(request)
    if request.top_logprobs and not request.logprobs:
        raise InvalidRequest("top_logprobs: needs logprobs to be true", param="top_logprobs")
    most = logprobs_room(request, prompts)
    room = output_room(len(prompts[0]), _max_tokens(request), most, info, "messages")
    sampling = [sampling_params(request, info, room, face.tokenizer)]
    judge_logprobs(request, prompts, sampling, "top_logprobs")
    return GenerationSpec(
        mix=mix,
        prompts=prompts,
        sampling=sampling,
        n=request.n,
        text=await text_options(request, face.tokenizer),
        stream=bool(request.stream),
        priority=request.priority,
        timeout_s=request.timeout,
        cache_salt=request.cache_salt or "",
        reply=ChatReply(request, face, "".join(reading.echoes or [])),
    )


def _max_tokens(request: ChatRequest) -> int | None:
    if request.max_completion_tokens is None:
        return request.max_tokens
    if request.max_tokens not in (None, request.max_completion_tokens):
        raise InvalidRequest("max_tokens: differs from max_completion_tokens", param="max_tokens")
    return request.max_completion_tokens


class ChatReply(Reply):
    """OpenAI's shape of a chat completion. `echo`: what stands before each choice's own text."""

    id_prefix = "chatcmpl"
    operation = "chat"
    whole = Chat
    part = ChatChunk
    _said_prompt = False

    def __init__(self, request: ChatRequest, face: Face, echo: str = "") -> None:
        super().__init__(request, face)
        self._echo = echo

    def choice_of_part(self, delta: Delta, *, first: bool) -> ChatChunkChoice:
        role: str | UnsetType = "assistant" if first else UNSET
        text = self._echo + delta.text if first else delta.text
        return ChatChunkChoice(
            delta.choice.index,
            ChatDelta(role, text if text or first else UNSET),
            self.logprobs(delta.logprobs) if delta.logprobs else None,
            delta.finish_reason,
        )

    def choice_of_whole(self, choice: Choice, text: str) -> ChatChoice:
        return ChatChoice(choice.index, ChatMessage(self._echo + text), UNSET, choice.finish_reason)

    def head_of_part(self, choices: list[AnyChoice]) -> Answer:
        head = super().head_of_part(choices)
        assert isinstance(head, ChatChunk)
        head.prompt_token_ids = UNSET
        if self.token_ids_wanted and not self._said_prompt:
            self._said_prompt = True
            head.prompt_token_ids = self.choices[0].request.prompt_token_ids
        return head

    def beside_choices(self) -> Iterator[Piece]:
        if self.token_ids_wanted:
            yield b',"prompt_token_ids":' + msgspec.json.encode(self.choices[0].request.prompt_token_ids)
        yield from self.prompt_logprobs(0)

    def logprobs(self, entries: list[TokenLogprobs]) -> ChatLogprobs:
        return self.names.chat(entries)
