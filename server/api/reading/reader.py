"""Bodies to requests and token ids: what is read, by plain functions. The time that it takes grows with the
body, so large ones are read in a process of their own (`process.py`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, TypeVar

import msgspec
from msgspec import UNSET

from server.api.inference.parsing import Body, parse
from server.api.inference.replies import Detokenized, Tokenized
from server.api.inference.schemas import (
    MOST_TRUNCATED,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    GenerationRequest,
    TokenizeRequest,
)
from server.api.inference.structured import Guide, guide_of
from server.api.inference.tools import ToolUse, tool_use
from server.api.reading.messages import ReadJob
from server.errors import InvalidGrammar, InvalidRequest
from server.guidance.matcher import Vocabulary
from server.text import thinking
from server.text.chat_template import ChatTemplate, cut_after
from server.text.tokenizer import Tokenizer
from server.text.tool_calls import ToolStyle

R = TypeVar("R", bound=GenerationRequest)
_SHORT = 1024  # characters; so few are tokenised sooner than judged


@dataclass(frozen=True)
class Reading(Generic[R]):
    """A judged body with its prompts. Those and what they were made of may be left out of `request`."""

    request: R
    prompts: list[list[int]]  # token ids, none empty, all in the vocabulary
    echoes: list[str] | None = None  # what stands before each prompt's output, where it was asked for
    grammar: str | None = None  # what every output must match
    ignored: list[str] = field(default_factory=list)  # unknown fields
    in_thought: bool = False  # the message that is to be continued breaks off within reasoning


class NotHere(Exception):
    """The body asks for a grammar, which only a process that can be ended may compile."""


@dataclass(frozen=True)
class ChatPrompt:
    """What a chat template is given. `options`: extra names; `given`: those that fields of the body set."""

    messages: list[dict[str, Any]]
    options: Mapping[str, Any] = field(default_factory=dict)
    given: Mapping[str, Any] = field(default_factory=dict)
    continues_last: bool = False  # the last message is the beginning of the answer

    @classmethod
    def of(cls, request: ChatRequest, use: ToolUse | None) -> ChatPrompt:
        """Raises InvalidRequest where the last message is to be continued and cannot be."""
        _judge_continuation(request)
        options = dict(request.chat_template_kwargs or {})
        if request.enable_thinking is not None:
            options.setdefault("enable_thinking", request.enable_thinking)
        if request.reasoning_effort is not None:
            options.setdefault("reasoning_effort", request.reasoning_effort)
            if request.reasoning_effort == "none":
                options.setdefault("enable_thinking", False)
        begins = request.add_generation_prompt
        return cls(
            [message.for_template() for message in request.messages],
            options,
            {
                "add_generation_prompt": not request.continue_final_message if begins is None else begins,
                "tools": use.for_template() if use else None,
                "documents": request.documents,
            },
            request.continue_final_message,
        )


class Reader:
    """Reads with one tokenizer and one chat template; None of what the model does not have."""

    def __init__(
        self, tokenizer: Tokenizer | None, template: ChatTemplate | None, style: ToolStyle | None = None
    ) -> None:
        self._tokenizer = tokenizer
        self._style = style
        self._template = template
        self._vocabulary: Vocabulary | None = None

    def completions(self, job: ReadJob) -> Reading[CompletionRequest]:
        """Raises InvalidRequest, as the others do."""
        ignored: list[str] = []
        request = _parsed(CompletionRequest, job, ignored)
        most = _most_tokens(request, job)
        special = request.add_special_tokens
        whole = [
            self._encode(prompt, job, "prompt", special=special, most=most)
            if isinstance(prompt, str)
            else prompt
            for prompt in request.prompt
        ]
        prompts = [_truncated(ids, request, job) for ids in whole]
        _judge(prompts, job, "prompt")
        echoes = None
        if request.echo:
            pairs = zip(request.prompt, whole, prompts, strict=True)
            echoes = [self._echo(prompt if ids == shown else shown, shown) for prompt, ids, shown in pairs]
        return Reading(request, prompts, echoes, self._grammar(guide_of(request), job), ignored)

    def chat(self, job: ReadJob) -> Reading[ChatRequest]:
        ignored: list[str] = []
        request = _parsed(ChatRequest, job, ignored)
        most = _most_tokens(request, job)
        use = self._tool_use(request)
        template = self._template_of(request, job)
        special = request.add_special_tokens
        ids = self._chat_prompt(template, ChatPrompt.of(request, use), job, special=special, most=most)
        prompt = _truncated(ids, request, job)
        _judge([prompt], job, "messages")
        last = request.messages[-1]
        echoes = [last.text if last.role == "assistant" else ""] if request.echo else None
        grammar = self._grammar(self._guide(request, use), job)
        in_thought = request.continue_final_message and thinking.is_open(last.text)
        return Reading(request, [prompt], echoes, grammar, ignored, in_thought)

    def _tool_use(self, request: ChatRequest) -> ToolUse | None:
        use = tool_use(request)
        if use is not None and self._style is None:
            raise InvalidRequest("tools: the model's chat template shows it none", param="tools")
        return use

    def _template_of(self, request: ChatRequest, job: ReadJob) -> ChatTemplate | str | None:
        if request.chat_template is not None and not job.rules.take_templates:
            raise InvalidRequest(
                "chat_template: this server takes none from requests (--trust-request-chat-template)",
                param="chat_template",
                code="unsupported",
            )
        return request.chat_template or self._template

    def _guide(self, request: ChatRequest, use: ToolUse | None) -> Guide | None:
        guide = guide_of(request)
        if use is None or self._style is None:
            return guide
        if guide is not None:
            raise InvalidRequest(f"{guide.field}: not together with tools", param=guide.field)
        return Guide("tools", partial(use.grammar, self._style)) if use.forced else None

    def tokenize(self, job: ReadJob) -> bytes:
        """The JSON of the answer."""
        body = _parsed(TokenizeRequest, job)
        tokenizer = self._require_tokenizer("prompt")
        if (body.prompt is None) == (body.messages is None):
            raise InvalidRequest("prompt: give either `prompt` or `messages`", param="prompt")
        if body.messages is not None:
            prompt = ChatPrompt([message.for_template() for message in body.messages])
            ids = self._chat_prompt(self._template, prompt, job)
        else:
            ids = self._encode(body.prompt or "", job, "prompt", special=body.add_special_tokens)
        token_strs = [tokenizer.token(token_id) for token_id in ids] if body.return_token_strs else UNSET
        return msgspec.json.encode(Tokenized(len(ids), job.max_model_len, ids, token_strs))

    def detokenize(self, job: ReadJob) -> bytes:
        """The JSON of the answer."""
        body = _parsed(DetokenizeRequest, job)
        tokenizer = self._require_tokenizer("tokens")
        if len(body.tokens) > job.max_model_len:
            raise InvalidRequest(
                f"tokens: {len(body.tokens)} tokens, this model's context is {job.max_model_len}",
                param="tokens",
                code="context_length_exceeded",
            )
        _judge_ids(body.tokens, job, "tokens")
        text = tokenizer.decode(body.tokens, skip_special_tokens=False)
        return msgspec.json.encode(Detokenized(text))

    def _chat_prompt(
        self,
        template: ChatTemplate | str | None,
        prompt: ChatPrompt,
        job: ReadJob,
        *,
        special: bool = False,
        most: int | None = None,
    ) -> list[int]:
        self._require_tokenizer("messages")
        if template is None:
            raise InvalidRequest("messages: this server's model has no chat template", param="messages")
        text = self.render(template, prompt)
        if prompt.continues_last:
            text = cut_after(text, prompt.messages[-1]["content"])
        return self._encode(text, job, "messages", special=special, most=most)

    def render(self, template: ChatTemplate | str, prompt: ChatPrompt) -> str:
        """The prompt's text; of a request's own template by its source. A process sets a limit to it."""
        if isinstance(template, str):
            tokenizer = self._require_tokenizer("messages")
            template = ChatTemplate.of_request(template, tokenizer.special_tokens)
        return template.render(prompt.messages, prompt.options, given=prompt.given)

    def _grammar(self, guide: Guide | None, job: ReadJob) -> str | None:
        if guide is None:
            return None
        self._require_tokenizer(guide.field)
        try:
            return self.judged(guide, job)
        except InvalidGrammar as error:
            raise InvalidGrammar(f"{guide.field}: {error.message}", param=guide.field) from None

    def judged(self, guide: Guide, job: ReadJob) -> str:
        """The grammar of a guide, compiled to see that it can be. Raises InvalidGrammar, and NotHere where
        the job is not to be held up by that."""
        if not job.compiles:
            raise NotHere
        grammar = guide.grammar()
        self.vocabulary(job).judge(grammar)
        return grammar

    def vocabulary(self, job: ReadJob) -> Vocabulary:
        """What grammars are judged by; made once. Raises InvalidGrammar."""
        if self._vocabulary is None:
            # Which token ends a text is the engine's to know, and makes no grammar right or wrong.
            text = self._require_tokenizer("model").to_json()
            self._vocabulary = Vocabulary.of(text, job.vocab_size, [0])
        return self._vocabulary

    def _encode(
        self, text: str, job: ReadJob, param: str, *, special: bool = True, most: int | None = None
    ) -> list[int]:
        """Token ids, with the tokenizer's own specials or none. Refuses what has more than `most` (None: the
        context) before it is tokenised, which takes some hundred times the text in memory."""
        tokenizer = self._require_tokenizer(param)
        most = most or job.max_model_len
        fewest = tokenizer.bound.at_least(text, most) if len(text) > _SHORT else 0
        if fewest > most:
            raise InvalidRequest(
                f"This model's context is {job.max_model_len} tokens; the prompt has at least {fewest}.",
                param=param,
                code="context_length_exceeded",
            )
        return tokenizer.encode(text) if special else tokenizer.encode_chat(text)

    def _echo(self, prompt: str | list[int], ids: list[int]) -> str:
        if isinstance(prompt, str):
            return prompt
        return self._tokenizer.decode(ids) if self._tokenizer else ""

    def _require_tokenizer(self, param: str) -> Tokenizer:
        if self._tokenizer is None:
            raise InvalidRequest(
                f"{param}: this server's model has no tokenizer; send token ids", param=param
            )
        return self._tokenizer


def _parsed(kind: type[Body], job: ReadJob, ignored: list[str] | None = None) -> Body:
    """Names of unknown fields go to `ignored`, where the rules say so."""
    unknown = ([] if ignored is None else ignored) if job.rules.ignore_unknown else None
    return parse(kind, job.body, job.max_model_len, unknown)


def _most_tokens(request: GenerationRequest, job: ReadJob) -> int:
    """That a prompt may have before it is truncated. Raises InvalidRequest where it is to be to nothing."""
    if request.truncate_prompt_tokens == 0:
        raise InvalidRequest(
            "truncate_prompt_tokens: must be -1, or 1 or more", param="truncate_prompt_tokens"
        )
    contexts = 1 if request.truncate_prompt_tokens is None else MOST_TRUNCATED
    return contexts * job.max_model_len


def _judge_continuation(request: ChatRequest) -> None:
    """What stands after a message's text is the end of it, so there may be nothing but that."""
    if not request.continue_final_message:
        return
    last, reason = request.messages[-1], None
    if request.add_generation_prompt:
        reason = "not together with add_generation_prompt"
    elif last.calls:
        reason = "the last message calls tools, so it is at its end"
    elif not last.text:
        reason = "the last message has no text"
    if reason is not None:
        raise InvalidRequest(f"continue_final_message: {reason}", param="continue_final_message")


def _truncated(ids: list[int], request: GenerationRequest, job: ReadJob) -> list[int]:
    """The part of a prompt that is asked for; with -1 as much as leaves room for the output."""
    most = request.truncate_prompt_tokens
    if most is None:
        return ids
    if most < 0:
        wanted = 1 if request.max_tokens is None else request.max_tokens
        most = max(job.max_model_len - wanted, 1)
    return ids[:most] if request.truncation_side == "right" else ids[-most:]


def _judge(prompts: list[list[int]], job: ReadJob, param: str) -> None:
    for ids in prompts:
        if not ids:
            raise InvalidRequest(f"{param}: a prompt without tokens", param=param)
        _judge_ids(ids, job, param)


def _judge_ids(ids: list[int], job: ReadJob, param: str) -> None:
    if ids and max(ids) >= job.vocab_size:
        largest = str(max(ids))[:40]
        raise InvalidRequest(
            f"{param}: token id {largest} is not in the vocabulary of {job.vocab_size}", param=param
        )
