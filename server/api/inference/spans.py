"""A generation as spans, in the words of OpenTelemetry's gen_ai conventions. No text of a client in them."""

from __future__ import annotations

from itertools import islice

from server.api.inference.generation import Generation
from server.api.inference.mix import LeasedMix
from server.api.inference.spec import GenerationSpec
from server.telemetry.sequence_metrics import SequenceTimes
from server.telemetry.traces import Attributes, RequestTrace

_SEQUENCES = 16  # that get spans of their own phases; a request may have hundreds


def trace_generation(
    trace: RequestTrace, spec: GenerationSpec, leased: LeasedMix, generation: Generation
) -> None:
    """Adds the span of the whole generation, and below it those of each sequence's phases."""
    times = list(generation.times.values())
    if not times:  # cut off before anything was asked of the engine
        return
    name = f"{spec.reply.operation} {spec.reply.model}"
    began, ended = min(each.submitted for each in times), max(each.last for each in times)
    attributes = _asked(spec) | _given(spec, leased, generation, times)
    whole = trace.child(name, began, ended, attributes)
    for at, each in enumerate(islice(times, _SEQUENCES)):
        _trace_phases(whole, at, each)


def _asked(spec: GenerationSpec) -> Attributes:
    sampling = spec.sampling[0]
    attributes: Attributes = {
        "gen_ai.operation.name": spec.reply.operation,
        "gen_ai.provider.name": "chorus",
        "gen_ai.request.model": spec.reply.model,
        "gen_ai.request.choice.count": spec.n,
        "gen_ai.request.max_tokens": sampling.max_tokens,
        "gen_ai.request.temperature": sampling.temperature,
        "gen_ai.request.top_p": sampling.top_p,
        "gen_ai.request.frequency_penalty": sampling.frequency_penalty,
        "gen_ai.request.presence_penalty": sampling.presence_penalty,
        "gen_ai.request.stream": spec.stream,
    }
    if sampling.top_k:
        attributes["gen_ai.request.top_k"] = sampling.top_k
    if sampling.seed is not None:
        attributes["gen_ai.request.seed"] = sampling.seed
    return attributes


def _given(
    spec: GenerationSpec, leased: LeasedMix, generation: Generation, times: list[SequenceTimes]
) -> Attributes:
    attributes: Attributes = {
        "gen_ai.response.id": spec.reply.id,
        "gen_ai.response.model": spec.reply.model,
        "gen_ai.response.finish_reasons": [str(each.end) for each in times],
        "gen_ai.usage.input_tokens": sum(map(len, spec.prompts)),
        "gen_ai.usage.output_tokens": sum(choice.completion_tokens for choice in generation.choices),
        "gen_ai.usage.cache_read.input_tokens": sum(each.cached_tokens for each in times),
    }
    if leased.members:
        attributes["chorus.adapter.names"] = [version.name for version, _ in leased.members]
        attributes["chorus.adapter.version"] = leased.version
    return attributes


def _trace_phases(whole: RequestTrace, index: int, times: SequenceTimes) -> None:
    """What the sequence did from when to when: what it did not come to has no span."""
    attributes: Attributes = {"chorus.choice.index": index}
    if times.first is None or times.started is None:
        return
    queue = whole.child("queue", times.submitted, times.started, attributes)
    if times.waited_for_adapter:
        queue.child("load adapter", times.submitted, times.started, attributes)
    whole.child("prefill", times.started, times.first, attributes | {"chorus.tokens": times.prompt_tokens})
    whole.child("decode", times.first, times.last, attributes | {"chorus.tokens": times.output_tokens})
