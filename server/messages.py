"""The only types that cross the border between the HTTP face and the engine process.

Encoded with msgspec (msgpack) over ZeroMQ. This module imports neither torch nor fastapi.
"""

from __future__ import annotations

import enum
from typing import Any, Literal

import msgspec

FinishReason = Literal["stop", "length", "abort", "error"]
Location = Literal["disk", "host", "arena"]  # where the weights of an adapter version are


class Waiting(msgspec.Struct, frozen=True):
    """What a process that has read its program says, as JSON: it can become an engine now."""

    pid: int


class Start(msgspec.Struct, frozen=True):
    """What makes an engine of a waiting process, as JSON."""

    settings: dict[str, Any]
    factory: str  # "module:callable", called with Settings, returns an EngineLike
    inbox: str  # ipc:// address the worker binds and receives ToEngine on
    outbox: str  # ipc:// address the face binds; the worker sends FromEngine to it
    parent_pid: int
    leave_spare: bool = False  # a copy of the process is to wait for the next Start


class AdapterRef(msgspec.Struct, frozen=True):
    """One member of a request's adapter mix: an immutable AdapterVersion and the weight of its delta."""

    digest: str  # of the version's content; the only identity the engine knows
    path: str  # folder with adapter_config.json and adapter_model.safetensors; never changes for a digest
    weight: float = 1.0
    content: str = ""  # the digest of its files alone, where `digest` is a tenant's own


class SamplingParams(msgspec.Struct, frozen=True, omit_defaults=True):
    """How one sequence is sampled. Validated by the face; the engine trusts it."""

    max_tokens: int  # 0: the prompt is computed, and that is all
    temperature: float = 1.0  # 0, or next to it = greedy
    top_k: int = 0  # 0 = off
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: tuple[int, ...] | None = None  # no others; None: all
    bad_words: tuple[tuple[int, ...], ...] = ()  # token ids that never come in this order
    seed: int | None = None  # None: the engine draws one
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    grammar: str | None = None  # what the output must match, in llguidance's form; None: anything
    logprobs: int | None = None  # None = off; n = the sampled token's and the n most likely ones
    processed_logprobs: bool = False  # of the distribution that is drawn from, not of the model's own
    prompt_logprobs: int | None = None  # the same of each prompt token but the first, by the model's own


class Fork(msgspec.Struct, frozen=True):
    """A further choice of a request, with an id and a seed of its own."""

    request_id: str
    seed: int | None = None  # None: the engine draws one


class Request(msgspec.Struct, frozen=True, tag="request"):
    """One choice of one client request, as the engine gets it. `adapters` empty = base model.

    `forks` are its other choices: each is a sequence of its own, whose outputs and end name its own id, but
    their prompt is computed once for all.
    """

    request_id: str
    prompt_token_ids: list[int]
    sampling: SamplingParams
    adapters: tuple[AdapterRef, ...] = ()
    forks: tuple[Fork, ...] = ()
    tenant: str = ""  # whose it is: tenants share the server fairly, and no prefix of one serves another
    cache_salt: str = ""  # prefixes are shared only among requests with the same
    priority: int = 0  # the smaller goes first
    timeout_s: float | None = None  # from its arrival to its last token; None: no limit
    weight: float = 1.0  # of the tenant: how much service it gets beside one of weight 1


class Abort(msgspec.Struct, frozen=True, tag="abort"):
    """The client went away, or a stop string was met. No terminal output is owed any more."""

    request_ids: list[str]


class LoadAdapter(msgspec.Struct, frozen=True, tag="load_adapter"):
    """Bring a version into the arena now; answered by AdapterResult. `pin` keeps it there."""

    call_id: int
    adapter: AdapterRef
    pin: bool = False


class UnloadAdapter(msgspec.Struct, frozen=True, tag="unload_adapter"):
    """Take a version out of the arena, now or at its last use; answered at once by AdapterResult.

    The answer's residency is "arena" while a running sequence still uses it.

    With `forget` its host copy is dropped as well (the version was deleted).
    """

    call_id: int
    digest: str
    forget: bool = False


class Shutdown(msgspec.Struct, frozen=True, tag="shutdown"):
    """Stop the loop. The face drains first, so whatever still runs is ended with an error."""


ToEngine = Request | Abort | LoadAdapter | UnloadAdapter | Shutdown


class ErrorCode(enum.StrEnum):
    """Why the engine ended a sequence with finish_reason "error"."""

    ADAPTER_LOAD_FAILED = "adapter_load_failed"
    ADAPTER_DAMAGED = "adapter_damaged"  # its files are not what was stored
    OUT_OF_MEMORY = "out_of_accelerator_memory"
    NEVER_FITS = "never_fits"
    NON_FINITE = "non_finite_logits"
    DEADLINE_EXCEEDED = "deadline_exceeded"
    PIN_LIMIT = "pin_limit"
    GRAMMAR = "grammar"  # it cannot be compiled or followed
    NO_TOKEN_LEFT = "no_token_left"  # what the request forbids is everything; the message has its fields
    INTERNAL = "internal_error"


class Logprobs(msgspec.Struct, frozen=True):
    """Log-probabilities of one position."""

    token_id: int
    logprob: float
    top: list[tuple[int, float]]  # most likely first
    rank: int = 0  # of the token, 1 is the likeliest; counted for prompt tokens only


class TokenOutput(msgspec.Struct, frozen=True, omit_defaults=True):
    """What one step made for one request. Exactly one output of a request has a finish_reason."""

    request_id: str
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    stop_token: int | None = None  # the stop token id that ended it (it is also the last of token_ids)
    error: ErrorCode | None = None
    message: str = ""
    cached_tokens: int = 0  # prompt tokens taken from the prefix cache, on the first output
    logprobs: list[Logprobs] | None = None
    # Of the next prompt tokens, from the second on; in outputs without token ids, before the first of those.
    prompt_logprobs: list[Logprobs] | None = None
    started_at: float | None = None  # on the first output: when it first left the line, time.monotonic()
    waited_for_adapter: bool = False  # on the first output: its adapters were what kept it in the line


# Upper bounds of `EngineStats.step_tokens`; one more count is of the steps above the last.
STEP_TOKEN_BOUNDS = (1, 8, 64, 256, 1024, 4096)


class EngineStats(msgspec.Struct, frozen=True):
    """A heartbeat: what the engine holds after a step."""

    steps: int
    running: int
    waiting: int
    waiting_for_adapter: int
    kv_blocks_total: int
    kv_blocks_free: int  # neither held by a sequence nor kept for prefix reuse
    kv_blocks_cached: int  # kept for prefix reuse, free to be taken
    arena_bytes_total: int
    arena_bytes_used: int
    host_bytes_used: int
    resident: tuple[str, ...]  # digests in the arena, most recently used last
    on_host: tuple[str, ...]  # digests with an image in host memory, in the arena as well or not
    preemptions: int
    adapter_loads: int  # copies into the arena so far
    adapter_evictions: int
    prompt_tokens: int  # computed so far (prefix hits not counted)
    cached_prompt_tokens: int
    generated_tokens: int
    waiting_digests: tuple[str, ...] = ()  # adapters that waiting sequences ask for
    running_digests: tuple[str, ...] = ()  # adapters that running sequences use
    prefix_query_tokens: int = 0  # prompt tokens looked up in the prefix cache so far
    step_tokens: tuple[int, ...] = ()  # steps so far by their number of tokens: see STEP_TOKEN_BOUNDS
    step_tokens_sum: int = 0  # tokens of all these steps


class StepOutputs(msgspec.Struct, frozen=True, tag="step"):
    """One publish per step."""

    outputs: list[TokenOutput]
    stats: EngineStats | None = None


class AdapterResult(msgspec.Struct, frozen=True, tag="adapter"):
    """Answer to LoadAdapter or UnloadAdapter."""

    call_id: int
    residency: Location
    milliseconds: float = 0.0
    error: ErrorCode | None = None
    message: str = ""


class LoraTarget(msgspec.Struct, frozen=True):
    """A Linear of the base model that an adapter may change."""

    name: str  # as in model.named_modules(), e.g. "model.layers.0.self_attn.q_proj"
    in_features: int
    out_features: int


class EngineInfo(msgspec.Struct, frozen=True):
    """What the engine is and holds; sent once when it is ready."""

    pid: int
    model_type: str
    device: str
    dtype: str
    vocab_size: int
    max_model_len: int  # tokens, prompt and output together
    parameters: int
    weights_bytes: int
    block_size: int  # tokens
    kv_blocks: int
    kv_bytes: int
    arena_bytes: int
    lora_targets: list[LoraTarget]
    load_seconds: float
    max_mix_rank: int | None = None  # most that a mix's ranks on one module may add up to; None: not known

    @property
    def rank16_adapters(self) -> int:
        """How many adapters of rank 16 on every target fit into the arena."""
        width = {"float32": 4}.get(self.dtype, 2)
        per_adapter = 16 * width * sum(t.in_features + t.out_features for t in self.lora_targets)
        return self.arena_bytes // per_adapter if per_adapter else 0


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """The engine loaded and takes requests."""

    info: EngineInfo


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """The engine could not start (a refused model, no memory); it ends after this message."""

    message: str


FromEngine = Ready | Failed | StepOutputs | AdapterResult
