"""`POST /v1/completions`."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from server.api.face import Face
from server.api.inference.generation import Choice, Delta, TokenLogprobs
from server.api.inference.mix import AdapterMix
from server.api.inference.replies import Completion, CompletionChoice, CompletionLogprobs
from server.api.inference.reply import Reply, logprobs_of, text_of
from server.api.inference.schemas import CompletionRequest, parse
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

_DEFAULT_MAX_TOKENS = 16  # as in OpenAI's API


@router.post("/v1/completions")
@Operation({200: Completion}, CompletionRequest, chunk=Completion, counted=True)
async def create_completion(request: Request) -> Response:
    return await generate(request, _spec)


def _spec(face: Face, info: EngineInfo, body: bytes) -> GenerationSpec:
    request = parse(CompletionRequest, body, info.max_model_len)
    mix = AdapterMix.of(request, face.base.name)
    if request.echo and request.logprobs is not None:
        raise InvalidRequest(
            "logprobs: not supported together with echo", param="logprobs", code="unsupported"
        )
    prompts = [_encode(face, prompt) for prompt in request.prompt]
    judge_prompts(prompts, info, request.n, "prompt")
    sampling = []
    for ids in prompts:
        room = output_room(len(ids), request.max_tokens, _DEFAULT_MAX_TOKENS, info, "prompt")
        sampling.append(sampling_params(request, info, room))
    echoes = [_echo(face, prompt, ids) for prompt, ids in zip(request.prompt, prompts, strict=True)]
    return GenerationSpec(
        mix=mix,
        prompts=prompts,
        sampling=sampling,
        n=request.n,
        text=text_options(request, face.tokenizer),
        stream=bool(request.stream),
        priority=request.priority,
        timeout_s=request.timeout,
        reply=CompletionReply(request, face, echoes if request.echo else None),
    )


def _encode(face: Face, prompt: str | list[int]) -> list[int]:
    return face.require_tokenizer("prompt").encode(prompt) if isinstance(prompt, str) else prompt


def _echo(face: Face, prompt: str | list[int], ids: list[int]) -> str:
    if isinstance(prompt, str):
        return prompt
    return face.tokenizer.decode(ids) if face.tokenizer else ""


class CompletionReply(Reply):
    """OpenAI's shape of a completion. `echoes`: what stands before each prompt's output, if anything."""

    id_prefix = "cmpl"
    whole = part = Completion

    def __init__(self, request: CompletionRequest, face: Face, echoes: list[str] | None) -> None:
        super().__init__(request, face)
        self._echoes = echoes

    def choice_of_part(self, delta: Delta, *, first: bool) -> CompletionChoice:
        return self._choice(delta.choice, [delta], with_echo=first)

    def choice_of_whole(self, choice: Choice, deltas: list[Delta]) -> CompletionChoice:
        return self._choice(choice, deltas, with_echo=True)

    def _choice(self, choice: Choice, deltas: list[Delta], *, with_echo: bool) -> CompletionChoice:
        echo = self._echoes[choice.prompt_index] if self._echoes and with_echo else ""
        return CompletionChoice(
            choice.index,
            echo + text_of(deltas),
            _logprobs(self.tokenizer, logprobs_of(deltas)),
            deltas[-1].finish_reason,
        )


def _logprobs(tokenizer: Tokenizer | None, entries: list[TokenLogprobs]) -> CompletionLogprobs | None:
    if not entries:
        return None
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
