"""`POST /v1/completions`."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

from fastapi import APIRouter
from msgspec import UNSET
from starlette.requests import Request
from starlette.responses import Response

from server.api.face import Face
from server.api.inference.generation import Choice, Delta, TokenLogprobs
from server.api.inference.logprobs import Columns, EchoedPrompt, joined
from server.api.inference.mix import AdapterMix
from server.api.inference.replies import Completion, CompletionChoice, CompletionLogprobs
from server.api.inference.reply import Piece, Reply
from server.api.inference.schemas import CompletionRequest
from server.api.inference.spec import (
    GenerationSpec,
    judge_choices,
    judge_logprobs,
    judge_stream,
    output_room,
    sampling_params,
    text_options,
)
from server.api.inference.sse import generate
from server.api.operation import Operation
from server.errors import InvalidRequest
from server.messages import EngineInfo, Logprobs

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
    judge_stream(request)
    _judge_best_of(request)
    judge_choices(len(prompts), request.sequences)
    sampling = []
    for ids in prompts:
        room = output_room(len(ids), request.max_tokens, _DEFAULT_MAX_TOKENS, info, "prompt")
        params = sampling_params(request, info, face.tokenizer, max_tokens=room, grammar=reading.grammar)
        sampling.append(params)
    judge_logprobs(request, prompts, sampling, "logprobs")
    return GenerationSpec(
        mix=mix,
        prompts=prompts,
        sampling=sampling,
        n=request.sequences,
        text=await text_options(request, face.tokenizer),
        stream=bool(request.stream),
        priority=request.priority,
        timeout_s=request.timeout,
        cache_salt=request.cache_salt or "",
        reply=CompletionReply(request, face, reading.echoes),
    )


def _judge_best_of(request: CompletionRequest) -> None:
    if request.sequences < request.n:
        raise InvalidRequest(f"best_of: must be n ({request.n}) or more", param="best_of")
    if request.sequences > request.n and request.stream:
        raise InvalidRequest("best_of: the best are known at the end, not in a stream", param="best_of")


class CompletionReply(Reply):
    """OpenAI's shape of a completion. `echoes`: what stands before each prompt's output, if anything."""

    id_prefix = "cmpl"
    operation = "text_completion"
    whole = part = Completion

    def __init__(self, request: CompletionRequest, face: Face, echoes: list[str] | None) -> None:
        super().__init__(request, face)
        self._echoes = echoes
        self._echoed_logprobs = request.echoed_logprobs
        self._of_each = request.n
        self._echoed: dict[int, EchoedPrompt] = {}  # by prompt, where its log-probabilities are shown
        self._columns: dict[int, Columns] = {}  # of those

    def start(self, adapter_version: str | None, choices: list[Choice]) -> None:
        super().start(adapter_version, choices)
        for choice in choices:
            choice.begin_after(len(self._echo(choice)))
            if self._echoed_logprobs is not None and choice.prompt_index not in self._echoed:
                self._begin_echo(choice, self._echoed_logprobs)

    def _begin_echo(self, choice: Choice, most: int) -> None:
        at, columns = choice.prompt_index, Columns()
        echoed = EchoedPrompt(self.names, self.tokenizer, choice.request.prompt_token_ids, most)
        columns.add(echoed.first)
        self._echoed[at], self._columns[at] = echoed, columns

    def chunks(self, delta: Delta) -> Iterator[bytes]:
        """Of a prompt's log-probabilities, a chunk for each of its choices."""
        at = delta.choice.prompt_index
        if delta.prompt_logprobs is None or at not in self._echoed:
            yield from super().chunks(delta)
            return
        columns = self._echoed[at].columns(delta.prompt_logprobs)
        for choice in self.choices:
            if choice.prompt_index == at:
                shown = CompletionChoice(choice.index, "", columns)
                self._begin(choice, shown, first=not self.has_started(choice))
                yield self.chunk(choice, [], shown)

    def choice_of_part(self, delta: Delta, *, first: bool) -> CompletionChoice:
        logprobs = self.logprobs(delta.logprobs) if delta.logprobs else None
        shown = CompletionChoice(delta.choice.index, delta.text, logprobs, delta.finish_reason)
        self._begin(delta.choice, shown, first=first)
        return shown

    def _begin(self, choice: Choice, shown: CompletionChoice, *, first: bool) -> None:
        """The first chunk of a choice begins with what is echoed."""
        if first:
            shown.text = self._echo(choice) + shown.text
            if echoed := self._echoed.get(choice.prompt_index):
                shown.logprobs = joined(echoed.first, shown.logprobs or None)

    def choice_of_whole(self, choice: Choice, text: str) -> CompletionChoice:
        return CompletionChoice(choice.index, self._echo(choice) + text, UNSET, choice.finish_reason)

    def shown(self) -> list[Choice]:
        """With `best_of` those of each prompt whose tokens were likeliest, by the mean log-probability."""
        best: list[Choice] = []
        for _, of_prompt in groupby(self.choices, key=lambda choice: choice.prompt_index):
            best += sorted(of_prompt, key=self.likelihood, reverse=True)[: self._of_each]
        return best if len(best) < len(self.choices) else self.choices

    def add_prompt(self, prompt_index: int, piece: list[Logprobs]) -> None:
        super().add_prompt(prompt_index, piece)
        if echoed := self._echoed.get(prompt_index):
            self._columns[prompt_index].add(echoed.columns(piece))

    def columns_of_prompt(self, prompt_index: int) -> Columns:
        return self._columns.get(prompt_index) or super().columns_of_prompt(prompt_index)

    def within_choice(self, choice: Choice) -> Iterator[Piece]:
        yield from self.prompt_logprobs(choice.prompt_index)

    def logprobs(self, entries: list[TokenLogprobs]) -> CompletionLogprobs:
        return self.names.completion(entries)

    def _echo(self, choice: Choice) -> str:
        return self._echoes[choice.prompt_index] if self._echoes else ""
