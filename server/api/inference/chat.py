"""`POST /v1/chat/completions`."""

from __future__ import annotations

from fastapi import APIRouter
from msgspec import UNSET, UnsetType
from starlette.requests import Request
from starlette.responses import Response

from server.api.face import Face
from server.api.inference.generation import Choice, Delta, TokenLogprobs
from server.api.inference.mix import AdapterMix
from server.api.inference.replies import (
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
from server.api.inference.reply import Reply, logprobs_of, text_of
from server.api.inference.schemas import ChatRequest, Message, parse
from server.api.inference.spec import (
    GenerationSpec,
    judge_prompts,
    output_room,
    sampling_params,
    text_options,
)
from server.api.inference.sse import generate
from server.api.operation import Operation
from server.errors import InvalidRequest
from server.messages import EngineInfo
from server.text.tokenizer import Tokenizer

router = APIRouter()


@router.post("/v1/chat/completions")
@Operation({200: Chat}, ChatRequest, chunk=ChatChunk, counted=True)
async def create_chat_completion(request: Request) -> Response:
    return await generate(request, _spec)


def _spec(face: Face, info: EngineInfo, body: bytes) -> GenerationSpec:
    request = parse(ChatRequest, body, info.max_model_len)
    mix = AdapterMix.of(request, face.base.name)
    if request.top_logprobs is not None and not request.logprobs:
        raise InvalidRequest("top_logprobs: needs logprobs to be true", param="top_logprobs")
    prompt = chat_prompt(face, request.messages, request.chat_template_kwargs)
    judge_prompts([prompt], info, request.n, "messages")
    room = output_room(len(prompt), _max_tokens(request), None, info, "messages")
    return GenerationSpec(
        mix=mix,
        prompts=[prompt],
        sampling=[sampling_params(request, info, room)],
        n=request.n,
        text=text_options(request, face.tokenizer),
        stream=bool(request.stream),
        priority=request.priority,
        timeout_s=request.timeout,
        reply=ChatReply(request, face),
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


def _max_tokens(request: ChatRequest) -> int | None:
    if request.max_completion_tokens is None:
        return request.max_tokens
    if request.max_tokens not in (None, request.max_completion_tokens):
        raise InvalidRequest("max_tokens: differs from max_completion_tokens", param="max_tokens")
    return request.max_completion_tokens


class ChatReply(Reply):
    """OpenAI's shape of a chat completion."""

    id_prefix = "chatcmpl"
    whole = Chat
    part = ChatChunk

    def choice_of_part(self, delta: Delta, *, first: bool) -> ChatChunkChoice:
        role: str | UnsetType = "assistant" if first else UNSET
        return ChatChunkChoice(
            delta.choice.index,
            ChatDelta(role, delta.text if delta.text or first else UNSET),
            _logprobs(self.tokenizer, logprobs_of([delta])),
            delta.finish_reason,
        )

    def choice_of_whole(self, choice: Choice, deltas: list[Delta]) -> ChatChoice:
        return ChatChoice(
            choice.index,
            ChatMessage(text_of(deltas)),
            _logprobs(self.tokenizer, logprobs_of(deltas)),
            choice.finish_reason,
        )


def _logprobs(tokenizer: Tokenizer | None, entries: list[TokenLogprobs]) -> ChatLogprobs | None:
    return ChatLogprobs([_logprob(tokenizer, entry) for entry in entries]) if entries else None


def _logprob(tokenizer: Tokenizer | None, entry: TokenLogprobs) -> ChatLogprob:
    raw = tokenizer.token_bytes(entry.values.token_id) if tokenizer else b""
    top = []
    for token_id, value in entry.values.top:
        top_raw = tokenizer.token_bytes(token_id) if tokenizer else b""
        top.append(TopLogprob(top_raw.decode(errors="replace"), value, list(top_raw)))
    return ChatLogprob(raw.decode(errors="replace"), entry.values.logprob, list(raw), top)
