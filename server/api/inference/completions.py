"""`POST /v1/completions`."""

from __future__ import annotations

from functools import partial

from fastapi import APIRouter
from msgspec import UNSET
from starlette.requests import Request
from starlette.responses import Response

from server.api.face import Face
from server.api.inference.generation import Choice, Delta, TokenLogprobs
from server.api.inference.mix import AdapterMix
from server.api.inference.replies import Completion, CompletionChoice, CompletionLogprobs
from server.api.inference.reply import Reply
from server.api.inference.schemas import CompletionRequest
from server.api.inference.spec import (
    GenerationSpec,
    judge_choices,
    judge_logprobs,
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

_DEFAULT_MAX_TOKENS = 16  # as in OpenAI's API


@router.post("/v1/completions")
@Operation({200: Completion}, CompletionRequest, chunk=Completion, counted=True, scopes=("infer",))
async def create_completion(request: Request) -> Response:
    return await generate(request, _spec)


async def _spec(face: Face, info: EngineInfo, body: bytes) -> GenerationSpec:
    reading = await face.readers.completions(body, info)
    request, prompts = reading.request, reading.prompts
    mix = AdapterMix.of(request, face.base.name)
    if request.echo and request.logprobs is not None:
        raise InvalidRequest(
            "logprobs: not supported together with echo", param="logprobs", code="unsupported"
        )
    judge_choices(len(prompts), request.n)
    sampling = []
    for ids in prompts:
        room = output_room(len(ids), request.max_tokens, _DEFAULT_MAX_TOKENS, info, "prompt")
        sampling.append(sampling_params(request, info, room, reading.grammar))
    judge_logprobs(request, sampling, "logprobs")
    return GenerationSpec(
        mix=mix,
        prompts=prompts,
        sampling=sampling,
        n=request.n,
        text=await text_options(request, face.tokenizer),
        stream=bool(request.stream),
        priority=request.priority,
        timeout_s=request.timeout,
        reply=CompletionReply(request, face, reading.echoes),
    )


class CompletionReply(Reply):
    """OpenAI's shape of a completion. `echoes`: what stands before each prompt's output, if anything."""

    id_prefix = "cmpl"
    operation = "text_completion"
    whole = part = Completion

    def __init__(self, request: CompletionRequest, face: Face, echoes: list[str] | None) -> None:
        super().__init__(request, face)
        self._echoes = echoes

    def choice_of_part(self, delta: Delta, *, first: bool) -> CompletionChoice:
        return CompletionChoice(
            delta.choice.index,
            self._echo(delta.choice) + delta.text if first else delta.text,
            self.logprobs(delta.logprobs) if delta.logprobs else None,
            delta.finish_reason,
        )

    def choice_of_whole(self, choice: Choice, text: str) -> CompletionChoice:
        return CompletionChoice(choice.index, self._echo(choice) + text, UNSET, choice.finish_reason)

    def logprobs(self, entries: list[TokenLogprobs]) -> CompletionLogprobs:
        name = partial(_name, self.tokenizer)
        return CompletionLogprobs(
            tokens=[name(entry.values.token_id) for entry in entries],
            token_logprobs=[entry.values.logprob for entry in entries],
            top_logprobs=[{name(i): value for i, value in entry.values.top} for entry in entries],
            text_offset=[entry.text_offset for entry in entries],
        )

    def _echo(self, choice: Choice) -> str:
        return self._echoes[choice.prompt_index] if self._echoes else ""


def _name(tokenizer: Tokenizer | None, token_id: int) -> str:
    """A token as text; `bytes:\\xe2` where it is a part of a character, so that names do not collide."""
    if tokenizer is None:
        return f"token_id:{token_id}"
    raw = tokenizer.token_bytes(token_id)
    try:
        return raw.decode() if raw else f"token_id:{token_id}"
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
