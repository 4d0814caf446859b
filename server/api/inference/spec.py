"""A judged request: everything that is known before its adapter is looked up and the engine is asked."""

from __future__ import annotations

import asyncio
import uuid
from dataclasses import dataclass

from server.api.inference.generation import Choice, TextOptions
from server.api.inference.mix import AdapterMix, LeasedMix
from server.api.inference.reply import Reply
from server.api.inference.schemas import MAX_LOGPROB_ENTRIES, MAX_SEQUENCES, GenerationRequest
from server.errors import InvalidRequest
from server.messages import EngineInfo, Fork, Request, SamplingParams
from server.text.stop import StopAutomaton
from server.text.tokenizer import Tokenizer

_FEW_CHARACTERS = 256  # of stop strings: an automaton of so many is made in a millisecond


@dataclass(frozen=True)
class GenerationSpec:
    """What to run: `n` choices of each prompt, each prompt with its own sampling (its room differs)."""

    mix: AdapterMix
    prompts: list[list[int]]
    sampling: list[SamplingParams]
    n: int
    text: TextOptions
    stream: bool
    reply: Reply
    priority: int = 0
    timeout_s: float | None = None
    cache_salt: str = ""

    @property
    def prompt_tokens(self) -> int:
        """Each prompt once."""
        return sum(map(len, self.prompts))

    def choices(self, leased: LeasedMix, tenant: str, longest_s: float, weight: float = 1.0) -> list[Choice]:
        """Choice i * n + k is the k-th of prompt i. Their ids are new, whatever the client calls them.
        `longest_s`: what the server lets any request take; `weight`: of the tenant."""
        run = uuid.uuid4().hex
        choices = []
        for at, (prompt, sampling) in enumerate(zip(self.prompts, self.sampling, strict=True)):
            ids = [f"{run}-{at * self.n + k}" for k in range(self.n)]
            forks = tuple(Fork(ids[k], _seed(sampling.seed, k)) for k in range(1, self.n))
            request = Request(
                ids[0],
                prompt,
                sampling,
                leased.refs,
                forks,
                tenant=tenant,
                priority=self.priority,
                timeout_s=min(self.timeout_s or longest_s, longest_s),
                weight=weight,
                cache_salt=self.cache_salt,
            )
            choices += [
                Choice(at * self.n + k, at, request, request_id, self.text)
                for k, request_id in enumerate(ids)
            ]
        return choices


def _seed(seed: int | None, k: int) -> int | None:
    """Choices of one prompt differ: the k-th one counts its seed k up, within an int64."""
    return None if seed is None else (seed + k + 2**63) % 2**64 - 2**63


def judge_stream(request: GenerationRequest) -> None:
    """Raises InvalidRequest for options of a stream without one."""
    if request.stream_options is not None and not request.stream:
        raise InvalidRequest("stream_options: only with stream", param="stream_options")


def judge_choices(prompts: int, n: int) -> None:
    """Raises InvalidRequest for too many."""
    if prompts * n > MAX_SEQUENCES:
        raise InvalidRequest(
            f"n: {prompts} prompts with {n} choices each, the limit is {MAX_SEQUENCES}", param="n"
        )


def logprobs_room(request: GenerationRequest, prompts: list[list[int]]) -> int | None:
    """How many tokens each choice may have, so that one answer does not hold too many log-probabilities;
    None where none were asked for."""
    wanted = request.top_logprobs_wanted
    if wanted is None:
        return None
    left = MAX_LOGPROB_ENTRIES - _prompt_entries(request, prompts)
    return max(left // ((wanted + 1) * request.sequences * len(prompts)), 1)


def _prompt_entries(request: GenerationRequest, prompts: list[list[int]]) -> int:
    """Log-probabilities of the prompts' tokens in one answer: every choice has those of its prompt."""
    asked = (request.echoed_logprobs, request.prompt_logprobs)
    each = sum(top + 1 for top in asked if top is not None)
    return each * request.sequences * sum(map(len, prompts))


def judge_logprobs(
    request: GenerationRequest, prompts: list[list[int]], sampling: list[SamplingParams], param: str
) -> None:
    """Raises InvalidRequest for more than one answer may have. `param` is the field that asks for them.

    A stream has the same limit as a body: where its client reads slowly, it waits in memory as a body does.
    """
    if (entries := _prompt_entries(request, prompts)) > MAX_LOGPROB_ENTRIES:
        param = param if request.prompt_logprobs is None else "prompt_logprobs"
        raise InvalidRequest(
            f"{param}: {entries} log-probabilities of the prompt in all choices, the limit of one answer is "
            f"{MAX_LOGPROB_ENTRIES}",
            param=param,
        )
    if request.prompt_logprobs is not None and request.stream:
        raise InvalidRequest(
            "prompt_logprobs: not with stream; ask for echo and logprobs", param="prompt_logprobs"
        )
    room = logprobs_room(request, prompts)
    asked = max(params.max_tokens for params in sampling)
    if room is not None and asked > room:
        raise InvalidRequest(
            f"{param}: max_tokens of {asked} in all choices are more than {MAX_LOGPROB_ENTRIES} "
            f"log-probabilities, the limit of one answer; {room} tokens are not",
            param=param,
        )


def output_room(
    prompt: int, max_tokens: int | None, default: int | None, info: EngineInfo, param: str
) -> int:
    """How many tokens a prompt of `prompt` tokens may be continued by.

    `max_tokens` is the client's limit, `default` what holds without one (None: as many as fit). Raises
    InvalidRequest where they do not fit into the context, or into the whole KV cache.
    """
    capacity = info.kv_blocks * info.block_size
    limit = min(info.max_model_len, capacity)
    if max_tokens is None and prompt < limit:
        return min(default or limit, limit - prompt)
    wanted = 1 if max_tokens is None else max_tokens
    total = prompt + wanted
    if total > info.max_model_len:
        raise InvalidRequest(
            f"This model's context is {info.max_model_len} tokens; the prompt has {prompt} and "
            f"{wanted} more were asked for.",
            param=param if prompt >= info.max_model_len else "max_tokens",
            code="context_length_exceeded",
        )
    if total > capacity:
        raise InvalidRequest(
            f"The prompt has {prompt} tokens and {wanted} more were asked for: this can never fit "
            f"into the KV cache of {capacity} tokens.",
            param=param if prompt >= capacity else "max_tokens",
            code="never_fits",
        )
    return total - prompt


def sampling_params(
    request: GenerationRequest,
    info: EngineInfo,
    tokenizer: Tokenizer | None,
    *,
    max_tokens: int,
    grammar: str | None = None,
) -> SamplingParams:
    """The engine's sampling parameters, of a request whose output is held to `grammar`. Raises InvalidRequest
    for token ids outside the vocabulary, and words where there is no tokenizer."""
    if request.min_tokens > max_tokens:
        raise InvalidRequest(f"min_tokens: more than the {max_tokens} tokens there are", param="min_tokens")
    ranked = request.sequences > request.n
    asked = [top for top in (request.echoed_logprobs, request.prompt_logprobs) if top is not None]
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=_or(request.temperature, 1.0),
        top_k=max(request.top_k or 0, 0),
        top_p=_or(request.top_p, 1.0),
        min_p=request.min_p,
        presence_penalty=_or(request.presence_penalty, 0.0),
        frequency_penalty=_or(request.frequency_penalty, 0.0),
        repetition_penalty=request.repetition_penalty,
        logit_bias=_logit_bias(request.logit_bias, info.vocab_size),
        allowed_token_ids=_token_ids(request.allowed_token_ids, info, "allowed_token_ids") or None,
        bad_words=_bad_words(request.bad_words or [], tokenizer),
        seed=request.seed,
        min_tokens=request.min_tokens,
        ignore_eos=request.ignore_eos,
        stop_token_ids=_token_ids(request.stop_token_ids, info, "stop_token_ids"),
        grammar=grammar,
        logprobs=0 if ranked and request.top_logprobs_wanted is None else request.top_logprobs_wanted,
        processed_logprobs=request.logprobs_mode in ("processed", "processed_logprobs"),
        prompt_logprobs=max(asked, default=None),
    )


async def text_options(
    request: GenerationRequest, tokenizer: Tokenizer | None, *, keeps_special: bool = False
) -> TextOptions:
    """`keeps_special`: special tokens stay in the text, whatever the request says. Raises InvalidRequest for
    stop strings where there is no text to find them in."""
    if request.stop and not request.detokenize:
        raise InvalidRequest("stop: not without text; use stop_token_ids", param="stop")
    if request.stop and tokenizer is None:
        raise InvalidRequest("stop: this server's model has no tokenizer; use stop_token_ids", param="stop")
    return TextOptions(
        tokenizer=tokenizer if request.detokenize else None,
        stops=await _automaton(request.stop or []),
        include_stop=request.include_stop_str_in_output,
        skip_special_tokens=request.skip_special_tokens and not keeps_special,
        min_tokens=request.min_tokens,
    )


async def _automaton(stops: list[str]) -> StopAutomaton | None:
    """In a thread where it takes long."""
    if not stops:
        return None
    if sum(map(len, stops)) <= _FEW_CHARACTERS:
        return StopAutomaton(stops)
    return await asyncio.to_thread(StopAutomaton, stops)


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def _logit_bias(bias: dict[str, float] | None, vocab_size: int) -> dict[int, float] | None:
    if not bias:
        return None
    for key in bias:
        if not (key.isascii() and key.isdecimal() and len(key) < 10 and int(key) < vocab_size):
            raise InvalidRequest(
                f"logit_bias: {key[:40]!r} is not a token id below {vocab_size}", param="logit_bias"
            )
    return {int(key): value for key, value in bias.items()}


def _token_ids(ids: list[int] | None, info: EngineInfo, param: str) -> tuple[int, ...]:
    if ids and max(ids) >= info.vocab_size:
        largest = str(max(ids))[:40]
        raise InvalidRequest(f"{param}: {largest} is not in the vocabulary of {info.vocab_size}", param=param)
    return tuple(ids or ())


def _bad_words(words: list[str], tokenizer: Tokenizer | None) -> tuple[tuple[int, ...], ...]:
    """Each as it is tokenised at the beginning of a text, and after a space where that begins otherwise."""
    if not words:
        return ()
    if tokenizer is None:
        raise InvalidRequest("bad_words: this server's model has no tokenizer", param="bad_words")
    found: dict[tuple[int, ...], None] = {}
    for word in words:
        bare, spaced = (tuple(tokenizer.encode_chat(space + word.lstrip())) for space in ("", " "))
        found[bare] = None
        if spaced and spaced[:1] != bare[:1] and len(spaced) == len(bare):
            found[spaced] = None
    return tuple(ids for ids in found if ids)
