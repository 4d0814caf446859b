"""Bodies to requests and token ids: what is read, by plain functions. The time that it takes grows with the
body, so large ones are read in a process of their own (`process.py`)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

import msgspec
from msgspec import UNSET

from server.api.inference.parsing import parse
from server.api.inference.replies import Detokenized, Tokenized
from server.api.inference.schemas import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    GenerationRequest,
    Message,
    TokenizeRequest,
)
from server.api.inference.structured import Guide, guide_of
from server.api.inference.tools import ToolUse, tool_use
from server.api.reading.messages import ReadJob
from server.errors import InvalidGrammar, InvalidRequest
from server.guidance.matcher import Vocabulary
from server.text.chat_template import ChatTemplate
from server.text.tokenizer import Tokenizer
from server.text.tool_calls import ToolStyle

R = TypeVar("R", bound=GenerationRequest)
_SHORT = 1024  # characters; so few are tokenised sooner than judged
TemplateOptions = dict[str, str | int | float | bool | None]


@dataclass(frozen=True)
class Reading(Generic[R]):
    """A judged body with its prompts. Those and the messages may be left out of `request`."""

    request: R
    prompts: list[list[int]]  # token ids, none empty, all in the vocabulary
    echoes: list[str] | None = None  # the text of each prompt, where it was asked for
    grammar: str | None = None  # what every output must match


class NotHere(Exception):
    """The body asks for a grammar, which only a process that can be ended may compile."""


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
        request = parse(CompletionRequest, job.body, job.max_model_len)
        prompts = [
            self._encode(prompt, job, "prompt") if isinstance(prompt, str) else prompt
            for prompt in request.prompt
        ]
        _judge(prompts, job, "prompt")
        echoes = None
        if request.echo:
            echoes = [self._echo(prompt, ids) for prompt, ids in zip(request.prompt, prompts, strict=True)]
        return Reading(request, prompts, echoes, self._grammar(guide_of(request), job))

    def chat(self, job: ReadJob) -> Reading[ChatRequest]:
        request = parse(ChatRequest, job.body, job.max_model_len)
        use = tool_use(request)
        if use is not None and self._style is None:
            raise InvalidRequest("tools: the model's chat template shows it none", param="tools")
        tools = use.for_template() if use else None
        prompt = self._chat_prompt(request.messages, request.chat_template_kwargs, job, tools)
        _judge([prompt], job, "messages")
        return Reading(request, [prompt], grammar=self._grammar(self._guide(request, use), job))

    def _guide(self, request: ChatRequest, use: ToolUse | None) -> Guide | None:
        guide = guide_of(request)
        if use is None or self._style is None:
            return guide
        if guide is not None:
            raise InvalidRequest(f"{guide.field}: not together with tools", param=guide.field)
        return Guide("tools", partial(use.grammar, self._style)) if use.forced else None

    def tokenize(self, job: ReadJob) -> bytes:
        """The JSON of the answer."""
        body = parse(TokenizeRequest, job.body, job.max_model_len)
        tokenizer = self._require_tokenizer("prompt")
        if (body.prompt is None) == (body.messages is None):
            raise InvalidRequest("prompt: give either `prompt` or `messages`", param="prompt")
        if body.messages is not None:
            ids = self._chat_prompt(body.messages, None, job)
        else:
            ids = self._encode(body.prompt or "", job, "prompt", special=body.add_special_tokens)
        token_strs = [tokenizer.token(token_id) for token_id in ids] if body.return_token_strs else UNSET
        return msgspec.json.encode(Tokenized(len(ids), job.max_model_len, ids, token_strs))

    def detokenize(self, job: ReadJob) -> bytes:
        """The JSON of the answer."""
        body = parse(DetokenizeRequest, job.body, job.max_model_len)
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
        messages: list[Message],
        options: TemplateOptions | None,
        job: ReadJob,
        tools: list[dict[str, Any]] | None = None,
    ) -> list[int]:
        self._require_tokenizer("messages")
        if self._template is None:
            raise InvalidRequest("messages: this server's model has no chat template", param="messages")
        text = self.render(self._template, [message.for_template() for message in messages], options, tools)
        return self._encode(text, job, "messages", special=False)

    def render(
        self,
        template: ChatTemplate,
        messages: list[dict[str, Any]],
        options: TemplateOptions | None,
        tools: list[dict[str, Any]] | None,
    ) -> str:
        """The prompt's text. A process sets a limit to its time."""
        return template.render(messages, options, tools=tools)

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

    def _encode(self, text: str, job: ReadJob, param: str, *, special: bool = True) -> list[int]:
        """Token ids, with the tokenizer's own specials or none. Refuses what is too long before it is
        tokenised, which takes some hundred times the text in memory."""
        tokenizer = self._require_tokenizer(param)
        fewest = tokenizer.bound.at_least(text, job.max_model_len) if len(text) > _SHORT else 0
        if fewest > job.max_model_len:
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
