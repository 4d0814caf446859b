"""`POST /v1/chat/completions`."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
from fastapi import APIRouter
from msgspec import UNSET
from starlette.requests import Request
from starlette.responses import Response

from server.api.face import Face
from server.api.inference.chat_text import ChatText
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
from server.api.inference.tools import ToolUse, tool_use
from server.api.operation import Operation
from server.api.reading.reader import Reading
from server.errors import InvalidRequest
from server.messages import EngineInfo
from server.text import thinking

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
    sampling = [sampling_params(request, info, face.tokenizer, max_tokens=room, grammar=reading.grammar)]
    judge_logprobs(request, prompts, sampling, "top_logprobs")
    inside, echo = _begins_reasoning(face, reading), "".join(reading.echoes or [])
    reply = ChatReply(request, face, tool_use(request), inside=inside, echo=echo)
    return GenerationSpec(
        mix=mix,
        prompts=prompts,
        sampling=sampling,
        n=request.n,
        text=await text_options(request, face.tokenizer, keeps_special=reply.keeps_special),
        stream=bool(request.stream),
        priority=request.priority,
        timeout_s=request.timeout,
        cache_salt=request.cache_salt or "",
        reply=reply,
    )


def _max_tokens(request: ChatRequest) -> int | None:
    if request.max_completion_tokens is None:
        return request.max_tokens
    if request.max_tokens not in (None, request.max_completion_tokens):
        raise InvalidRequest("max_tokens: differs from max_completion_tokens", param="max_tokens")
    return request.max_completion_tokens


def _begins_reasoning(face: Face, reading: Reading[ChatRequest]) -> bool | None:
    """Whether the prompt ends with the beginning of the reasoning, or within it; None where there is to be
    none: the model does not reason, or the output is held to a form."""
    if not face.style.thinks or face.tokenizer is None or reading.grammar is not None:
        return None
    end = face.tokenizer.decode(reading.prompts[0][-_ENDING_TOKENS:], skip_special_tokens=False)
    return reading.in_thought or end.rstrip().endswith(thinking.BEGIN)


_ENDING_TOKENS = 16  # of a prompt: its last line
_NOTHING, _ONLY_ROLE = ChatDelta(), ChatDelta("assistant")


class ChatReply(Reply):
    """OpenAI's shape of a chat completion. `echo`: what stands before each choice's own text."""

    id_prefix = "chatcmpl"
    operation = "chat"
    whole = Chat
    part = ChatChunk
    _said_prompt = False

    def __init__(
        self,
        request: ChatRequest,
        face: Face,
        use: ToolUse | None,
        *,
        inside: bool | None,
        echo: str = "",
    ) -> None:
        """`inside`: whether the prompt has begun the reasoning; None where there is none."""
        super().__init__(request, face)
        self._style, self._use, self._inside, self._echo = face.style, use, inside, echo
        self._answers: dict[int, ChatText] = {}
        self._said = ChatDelta()

    @property
    def keeps_special(self) -> bool:
        """Whether special tokens are needed in the text, as marks of calls."""
        return self._use is not None and self._style.tools is not None and self._style.tools.special

    def chunks(self, delta: Delta) -> Iterator[bytes]:
        """Nothing where no more is known than that something may follow."""
        if delta.prompt_logprobs is None:
            self._said = self._take(delta)
            if self._said == _NOTHING:
                delta = msgspec.structs.replace(delta, text="")
        yield from super().chunks(delta)

    def choice_of_part(self, delta: Delta, *, first: bool) -> ChatChunkChoice:
        said = self._said
        if first:
            said.role = "assistant"
            if self._echo or said == _ONLY_ROLE:
                said.content = self._echo + (said.content or "")
        return ChatChunkChoice(
            delta.choice.index,
            said,
            self.logprobs(delta.logprobs) if delta.logprobs else None,
            self._answer(delta.choice).finish_reason(delta.finish_reason),
        )

    def add(self, delta: Delta) -> None:
        self._take(delta)
        super().add(delta)

    def choice_of_whole(self, choice: Choice, text: str) -> ChatChoice:
        answer = self._answer(choice)
        message = answer.message()
        if self._echo:
            message.content = self._echo + (message.content or "")
        return ChatChoice(choice.index, message, UNSET, answer.finish_reason(choice.finish_reason))

    def _take(self, delta: Delta) -> ChatDelta:
        return self._answer(delta.choice).push(delta.text, last=delta.finish_reason is not None)

    def _answer(self, choice: Choice) -> ChatText:
        answer = self._answers.get(choice.index)
        if answer is None:
            answer = self._answers[choice.index] = ChatText(
                self._style, self._use, thinks=self._inside is not None, inside=bool(self._inside)
            )
        return answer

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
