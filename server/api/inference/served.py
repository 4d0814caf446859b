"""What a request came to, for the books on its adapters."""

from __future__ import annotations

from server.api.face import Face
from server.api.inference.generation import Generation
from server.api.inference.mix import LeasedMix
from server.telemetry.adapter_metrics import Served


def count_served(face: Face, leased: LeasedMix, generation: Generation, outcome: str) -> None:
    """Adds an ended request to the figures of each of its adapters: those kept, and those in the metrics."""
    prompts = {id(choice.request): len(choice.request.prompt_token_ids) for choice in generation.choices}
    tokens = sum(choice.completion_tokens for choice in generation.choices)
    times = generation.times.values()
    first_token_s = min(
        (each.first - each.submitted for each in times if each.first is not None), default=None
    )
    for version, _ in leased.members:
        face.require_registry().served(version, tokens)
        face.metrics.adapters.count(
            Served(version.label, version.digest, outcome, sum(prompts.values()), tokens, first_token_s)
        )
