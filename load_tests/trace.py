"""Request traces: who asks for which adapter, when, with what prompt, for how many tokens.

A trace is a JSONL file, one request a line, so that the very same load can be replayed against several
servers. It is a pure function of its `TraceSpec`. Popularity follows a power law, as in S-LoRA (Sheng et al.
2023, section 7), whose traces also draw inter-arrival times from a gamma distribution.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
from numpy.typing import NDArray


class TraceRequest(msgspec.Struct, frozen=True):
    """One line of a trace."""

    id: int
    arrival_s: float  # since the start of the run; 0 for every request of a closed-loop trace
    adapter: str | None  # None: the base model
    rank: int  # popularity of the adapter, 1 = most asked for; 0 = the base model
    prompt: list[int] | str  # token ids, or text
    max_tokens: int


class Lengths(msgspec.Struct, frozen=True):
    """A distribution of lengths in tokens: fixed, uniform (both ends included) or capped lognormal."""

    kind: Literal["fixed", "uniform", "lognormal"]
    low: int  # fixed: the length; uniform: the smallest; lognormal: the median
    high: int  # uniform: the largest; lognormal: the cap
    sigma: float = 0.0  # lognormal: standard deviation of the logarithm

    @classmethod
    def parse(cls, text: str) -> Lengths:
        """`128`, `fixed:128`, `uniform:16:256` or `lognormal:MEDIAN:SIGMA:CAP`. Raises ValueError."""
        kind, *numbers = text.split(":") if ":" in text else ("fixed", text)
        try:
            match kind, numbers:
                case "fixed", [length]:
                    lengths = cls("fixed", int(length), int(length))
                case "uniform", [low, high]:
                    lengths = cls("uniform", int(low), int(high))
                case "lognormal", [median, sigma, cap]:
                    lengths = cls("lognormal", int(median), int(cap), float(sigma))
                case _:
                    raise ValueError
        except ValueError:
            raise ValueError(
                f"{text!r} is not a length distribution; "
                "write 128, uniform:LOW:HIGH or lognormal:MEDIAN:SIGMA:CAP (tokens)"
            ) from None
        if not 1 <= lengths.low <= lengths.high or not 0 <= lengths.sigma < math.inf:
            raise ValueError(f"{text!r}: lengths must be at least 1 and in rising order")
        return lengths

    def draw(self, rng: np.random.Generator, count: int) -> NDArray[np.int64]:
        """`count` lengths in tokens, each at least 1."""
        if self.kind == "lognormal":
            drawn = np.exp(rng.normal(math.log(self.low), self.sigma, count))
            return np.clip(np.rint(drawn), 1, self.high).astype(np.int64)
        return rng.integers(self.low, self.high, count, endpoint=True)


class TraceSpec(msgspec.Struct, frozen=True):
    """Everything a trace is made from. Equal specs give equal traces."""

    requests: int
    adapters: tuple[str, ...]  # most popular first
    alpha: float = 1.0  # Zipf exponent: the k-th adapter is asked for in proportion to k**-alpha; 0 = evenly
    base_share: float = 0.0  # share of requests that name no adapter, 0 to 1
    rate: float | None = None  # mean arrivals, requests/s; None: closed loop
    burstiness: float = 1.0  # coefficient of variation of inter-arrival times: 0 = a metronome, 1 = Poisson
    prompt_tokens: Lengths = Lengths("fixed", 128, 128)
    output_tokens: Lengths = Lengths("fixed", 64, 64)
    token_ids: tuple[int, int] = (100, 1000)  # prompts are drawn from this range, both ends included
    prompts: tuple[str, ...] = ()  # texts to draw prompts from instead of random token ids
    seed: int = 0

    def __post_init__(self) -> None:
        low, high = self.token_ids
        for ok, complaint in (
            (self.requests >= 1, "requests must be at least 1"),
            (0 <= self.alpha < math.inf, "alpha must not be negative"),
            (0 <= self.base_share <= 1, "base_share must be between 0 and 1"),
            (self.adapters or self.base_share == 1, "without adapters, base_share must be 1"),
            (self.rate is None or 0 < self.rate < math.inf, "rate must be above 0 requests/s"),
            (0 <= self.burstiness < math.inf, "burstiness must not be negative"),
            (0 <= low <= high, "token_ids must be a rising range of ids that are not negative"),
        ):
            if not ok:
                raise ValueError(complaint)


def adapter_names(count: int) -> tuple[str, ...]:
    """The names that both `trace` and `adapters` use by default: adapter-000, adapter-001, ..."""
    digits = max(3, len(str(count - 1)))
    return tuple(f"adapter-{index:0{digits}d}" for index in range(count))


def popularity(count: int, alpha: float) -> NDArray[np.float64]:
    """Zipf: the share of requests of each of `count` adapters, most popular first; sums to 1."""
    weights = np.arange(1, count + 1, dtype=np.float64) ** -alpha
    return np.asarray(weights / weights.sum(), dtype=np.float64)


def generate(spec: TraceSpec) -> list[TraceRequest]:
    """The trace of `spec`, in order of arrival.

    Each property has its own random stream, so changing one (say the rate) leaves the others as they were.
    """
    streams = [np.random.default_rng(seed) for seed in np.random.SeedSequence(spec.seed).spawn(5)]
    for_ranks, for_base, for_arrivals, for_lengths, for_prompts = streams
    ranks = _ranks(spec, for_ranks, for_base)
    arrivals = _arrivals(spec, for_arrivals)
    outputs = spec.output_tokens.draw(for_lengths, spec.requests)
    prompts = _prompts(spec, for_prompts)
    return [
        TraceRequest(
            id=index,
            arrival_s=round(float(arrivals[index]), 6),
            adapter=spec.adapters[rank - 1] if rank else None,
            rank=rank,
            prompt=prompts[index],
            max_tokens=int(outputs[index]),
        )
        for index, rank in enumerate(ranks.tolist())
    ]


def _ranks(
    spec: TraceSpec, for_ranks: np.random.Generator, for_base: np.random.Generator
) -> NDArray[np.int64]:
    is_base = for_base.random(spec.requests) < spec.base_share
    if not spec.adapters:
        return np.zeros(spec.requests, dtype=np.int64)
    shares = popularity(len(spec.adapters), spec.alpha)
    drawn = for_ranks.choice(len(shares), size=spec.requests, p=shares) + 1
    return np.where(is_base, 0, drawn)


def _arrivals(spec: TraceSpec, rng: np.random.Generator) -> NDArray[np.float64]:
    """Seconds since the start; the first request arrives at 0."""
    if spec.rate is None:
        return np.zeros(spec.requests)
    mean = 1 / spec.rate
    if spec.burstiness == 0:
        return np.arange(spec.requests, dtype=np.float64) * mean
    shape = spec.burstiness**-2  # a gamma distribution of shape k has the coefficient of variation k**-0.5
    gaps = rng.gamma(shape, mean / shape, spec.requests - 1)
    return np.concatenate([np.zeros(1), np.cumsum(gaps)])


def _prompts(spec: TraceSpec, rng: np.random.Generator) -> Sequence[list[int] | str]:
    if spec.prompts:
        return [spec.prompts[index] for index in rng.integers(0, len(spec.prompts), spec.requests)]
    lengths = spec.prompt_tokens.draw(rng, spec.requests)
    low, high = spec.token_ids
    return [rng.integers(low, high, length, endpoint=True).tolist() for length in lengths.tolist()]


def write_trace(path: Path, requests: Iterable[TraceRequest]) -> None:
    """Write `requests` as JSONL."""
    encoder = msgspec.json.Encoder()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.writelines(encoder.encode(request) + b"\n" for request in requests)


def read_trace(path: Path) -> list[TraceRequest]:
    """Read a JSONL trace. Raises ValueError that names the line at fault."""
    return list(_decoded_lines(path))


def _decoded_lines(path: Path) -> Iterator[TraceRequest]:
    decoder = msgspec.json.Decoder(TraceRequest)
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                yield decoder.decode(line)
            except msgspec.DecodeError as error:
                raise ValueError(f"{path.name}, line {number}: {error}") from None
