"""What the HTTP face sees of each sequence: its tokens, its times, how it ended.

The bounds of the `vllm:` histograms are some of vLLM's own: all of them would make `/metrics` too large.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Literal

from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from server.messages import Request, TokenOutput
from server.telemetry.exposition import Distribution, counter

SequenceEnd = Literal["stop", "length", "abort", "error"]
_ENDS: tuple[SequenceEnd, ...] = ("stop", "length", "abort", "error")

_FIRST_TOKEN_S = (0.01, 0.04, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 40)
_NEXT_TOKEN_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.5, 2.5)  # the first is not one of vLLM's
_TOKEN_TIME_S = (0.01, 0.05, 0.1, 0.5)
_WHOLE_S = (0.3, 1, 2.5, 5, 10, 30, 60, 240)
_PHASE_S = (0.3, 1, 5, 30)
_LENGTH = (10, 100, 200, 500, 1000, 2000, 10000, 100000)  # tokens
_ASKED_LENGTH = (10, 100, 1000, 10000)  # tokens
_CHOICES = (1, 20)


class SequenceTimes:
    """The life of one sequence, in seconds of time.monotonic(): the engine's clock as well.

    `submitted`: handed to the engine. `started`: left the engine's line. `first`, `last`: its first and its
    newest output came; None before.
    """

    __slots__ = (
        "cached_tokens", "end", "first", "last", "max_tokens", "output_tokens", "prompt_tokens", "started",
        "submitted", "waited_for_adapter",
    )  # fmt: skip

    def __init__(self, request: Request) -> None:
        self.prompt_tokens = len(request.prompt_token_ids)
        self.max_tokens = request.sampling.max_tokens
        self.cached_tokens = 0
        self.output_tokens = 0
        self.submitted = self.last = time.monotonic()
        self.started: float | None = None
        self.first: float | None = None
        self.waited_for_adapter = False
        self.end: SequenceEnd | None = None


class SequenceMetrics(Collector):
    """Counts sequences while they run. Used from the event loop alone."""

    def __init__(self, model_name: str) -> None:
        self._labels = {"model_name": model_name}
        self._prompts_taken = self._output_tokens = 0
        self._prompt_tokens = 0
        self._ends = dict.fromkeys(_ENDS, 0)
        self._first_token = Distribution(_FIRST_TOKEN_S)
        self._next_token = Distribution(_NEXT_TOKEN_S)
        self._token_time = Distribution(_TOKEN_TIME_S)
        self._whole, self._inference = Distribution(_WHOLE_S), Distribution(_PHASE_S)
        self._queue, self._prefill, self._decode = (Distribution(_PHASE_S) for _ in range(3))
        self._prompt_length, self._output_length = Distribution(_LENGTH), Distribution(_LENGTH)
        self._longest, self._max_tokens = Distribution(_ASKED_LENGTH), Distribution(_ASKED_LENGTH)
        self._choices = Distribution(_CHOICES)

    def begin(self, request: Request) -> list[SequenceTimes]:
        """A prompt is handed to the engine: the times of its first choice and of each fork, to be kept."""
        self._prompts_taken += len(request.prompt_token_ids)
        self._choices.observe(1 + len(request.forks))
        return [SequenceTimes(request) for _ in range(1 + len(request.forks))]

    def output(self, times: SequenceTimes, output: TokenOutput, tokens: int) -> None:
        """The engine's output gave the sequence `tokens` tokens, one at least."""
        now = time.monotonic()
        self._output_tokens += tokens
        times.output_tokens += tokens
        if times.first is None:
            self._first(times, output, now)
        else:
            self._next_token.observe(now - times.last)
        times.last = now

    def end(self, times: SequenceTimes, end: SequenceEnd) -> None:
        """The sequence has ended; the latencies of those cut off are not counted."""
        times.end = end
        self._ends[end] += 1
        if end in ("abort", "error") or times.first is None:
            return
        decode = times.last - times.first
        self._whole.observe(times.last - times.submitted)
        self._decode.observe(decode)
        if times.output_tokens > 1:
            self._token_time.observe(decode / (times.output_tokens - 1))
        if times.started is not None:
            self._queue.observe(max(0.0, times.started - times.submitted))
            self._prefill.observe(times.first - times.started)
            self._inference.observe(times.last - times.started)
        self._prompt_length.observe(times.prompt_tokens)
        self._output_length.observe(times.output_tokens)
        self._max_tokens.observe(times.max_tokens)

    def prompt_ended(self, choices: Iterable[SequenceTimes], error: Exception | None = None) -> None:
        """All choices of a prompt are over: those without an end of their own failed by `error`, or were cut
        off."""
        for times in choices:
            if times.end is None:
                self.end(times, "abort" if error is None else "error")
        whole = [times.output_tokens for times in choices if times.end in ("stop", "length")]
        if whole:
            self._longest.observe(max(whole))

    def _first(self, times: SequenceTimes, output: TokenOutput, now: float) -> None:
        times.first, times.started = now, output.started_at
        times.waited_for_adapter = output.waited_for_adapter
        times.cached_tokens = output.cached_tokens
        self._prompt_tokens += times.prompt_tokens
        self._first_token.observe(now - times.submitted)

    def describe(self) -> list[Metric]:
        return []  # else registering would call collect() for the names

    def collect(self) -> Iterator[Metric]:
        labels = self._labels
        yield counter("chorus_prompt_tokens", "Prompt tokens of accepted prompts.", self._prompts_taken)
        yield counter("chorus_output_tokens", "Tokens given to clients.", self._output_tokens)
        yield counter("vllm:prompt_tokens", "Of sequences with a token.", self._prompt_tokens, labels)
        yield counter("vllm:generation_tokens", "Tokens given.", self._output_tokens, labels)
        ends = CounterMetricFamily("vllm:request_success", "Ended.", labels=[*labels, "finished_reason"])
        for end, count in self._ends.items():
            ends.add_metric([*labels.values(), end], count)
        yield ends
        yield self._first_token.family("vllm:time_to_first_token_seconds", "To the first token.", labels)
        yield self._next_token.family("vllm:inter_token_latency_seconds", "Between outputs.", labels)
        yield self._token_time.family("vllm:request_time_per_output_token_seconds", "Mean.", labels)
        yield self._whole.family("vllm:e2e_request_latency_seconds", "To the last token.", labels)
        yield self._queue.family("vllm:request_queue_time_seconds", "In the line.", labels)
        yield self._inference.family("vllm:request_inference_time_seconds", "From its start.", labels)
        yield self._prefill.family("vllm:request_prefill_time_seconds", "Start to first token.", labels)
        yield self._decode.family("vllm:request_decode_time_seconds", "First to last token.", labels)
        yield self._prompt_length.family("vllm:request_prompt_tokens", "Prompt.", labels)
        yield self._output_length.family("vllm:request_generation_tokens", "Output.", labels)
        yield self._longest.family("vllm:request_max_num_generation_tokens", "Longest choice.", labels)
        yield self._max_tokens.family("vllm:request_params_max_tokens", "max_tokens.", labels)
        yield self._choices.family("vllm:request_params_n", "n.", labels)
