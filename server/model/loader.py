"""Any dense decoder that transformers loads, checked to be one that this server runs correctly."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.utils.logging import disable_progress_bar

from server.config import Settings
from server.model.attention.backends import Layers
from server.model.attention.hf import NAME, ProbeStep, UnsupportedModel
from server.model.attention.interface import AttentionOptions, LayerCacheSpec
from server.model.proof import LENGTHS, InFloat32, Proof, probe_ids, probe_positions, relative_error

log = logging.getLogger(__name__)

_CPU = torch.device("cpu")
_SMALL = 50_000_000  # parameters: one core computes the probe in a fraction of a second
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class LoadedModel:
    """A base model on its device, in eval mode, and what the rest of the engine must know of it."""

    model: PreTrainedModel
    model_type: str
    device: torch.device
    dtype: torch.dtype
    vocab_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    cache_specs: dict[int, LayerCacheSpec]  # by layer index
    attention_options: dict[int, AttentionOptions]  # by layer index
    proof: Proof  # what fast paths are judged by
    parameters: int
    weights_bytes: int
    load_seconds: float

    @property
    def attention_layers(self) -> Layers:
        return Layers(self.cache_specs.values(), self.attention_options.values(), self.dtype)


def load(settings: Settings, device: torch.device = _CPU) -> LoadedModel:
    """Load the base model onto `device`.

    Raises UnsupportedModel, with the reason, where it would be served wrongly.
    """
    started = time.monotonic()
    disable_progress_bar()  # a bar that redraws itself is noise in a server's log
    try:
        config = AutoConfig.from_pretrained(settings.model, revision=settings.revision)
    except (OSError, ValueError) as error:
        raise UnsupportedModel(f"transformers does not read this model's config: {error}") from error
    dtype = _DTYPES.get(settings.dtype) or getattr(config.get_text_config(), "dtype", None) or torch.float32
    max_model_len = _context_length(config, settings.max_model_len)
    _refuse_by_config(config, max_model_len)
    torch.manual_seed(settings.seed)
    if settings.load_format == "dummy":
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=NAME)
    else:
        model = AutoModelForCausalLM.from_pretrained(
            settings.model, revision=settings.revision, dtype=dtype, attn_implementation=NAME
        )
    model = model.to(device).eval().requires_grad_(False)
    vocab_size = config.get_text_config().vocab_size
    unique = {p.data_ptr(): p for p in model.parameters()}.values()
    parameters = sum(p.numel() for p in unique)
    with threads_for(parameters):
        specs, attention_options, proof = probe(model, vocab_size, device)
    return LoadedModel(
        model=model,
        model_type=config.model_type,
        device=device,
        dtype=dtype,
        vocab_size=vocab_size,
        max_model_len=max_model_len,
        eos_token_ids=_eos_token_ids(settings, config),
        cache_specs=specs,
        attention_options=attention_options,
        proof=proof,
        parameters=parameters,
        weights_bytes=sum(p.nbytes for p in unique),
        load_seconds=time.monotonic() - started,
    )


def read_classes(settings: Settings) -> None:
    """Import what `load` imports for this model, and have transformers make its tables: half of what a small
    one takes. Asks no network and no device, so a process may do it before it forks."""
    if not Path(settings.model).is_dir():
        return
    config = AutoConfig.from_pretrained(settings.model)
    get_checkpoint_conversion_mapping(config.model_type)
    _ = AutoModelForCausalLM._model_mapping[type(config)]


@contextmanager
def threads_for(parameters: int) -> Iterator[None]:
    """One thread inside, for a small model: on a busy machine threads that wait for each other take twenty
    times as long as the few tokens of the probe, or as packing the weights."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if parameters < _SMALL else threads)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@torch.inference_mode()
def probe(
    model: PreTrainedModel, vocab_size: int, device: torch.device
) -> tuple[dict[int, LayerCacheSpec], dict[int, AttentionOptions], Proof]:
    """Run a few tokens, refuse a model that is not computed right.

    Returns each layer's KV shape and options, and what fast paths are judged by. Packed prompts must give
    the logits that the last of them gives alone under the model's own (eager) attention, in float32. This
    catches, whatever the architecture, layers that mix tokens without calling the attention function
    (linear attention, convolutions), positions that are not taken from `position_ids`, and options of the
    attention that a backend would miss.
    """
    ids, positions = probe_ids(vocab_size, device), probe_positions(device)
    rows = torch.arange(len(ids), device=device)
    step = ProbeStep(LENGTHS)
    usual = forward(model, ids, positions, rows, step)
    layers = model.config.get_text_config().num_hidden_layers
    if step.calls != layers or len(step.specs) != layers:
        raise UnsupportedModel(
            f"{step.calls} of the model's {layers} layers call the attention function; other kinds of layer "
            "(linear attention, state space, shared KV) are not supported"
        )
    with InFloat32():
        exact = forward(model, ids, positions, rows, ProbeStep(LENGTHS))
        alone = _eager_logits(model, ids[-LENGTHS[-1] :])
    error = relative_error(exact[-LENGTHS[-1] :], alone)
    if not error < 1e-3:
        raise UnsupportedModel(
            f"a packed batch gives other logits than the model's own attention (relative error {error:.2g}); "
            "this architecture is not supported"
        )
    return step.specs, step.options, Proof(ids, exact, usual)


def _eager_logits(model: PreTrainedModel, ids_T: torch.Tensor) -> torch.Tensor:
    """[T, vocabulary] of one sequence under transformers' own attention."""
    try:
        model.set_attn_implementation("eager")
        logits: torch.Tensor = model(ids_T[None], use_cache=False).logits
    finally:
        model.set_attn_implementation(NAME)
    return logits[0]


def forward(
    model: PreTrainedModel, ids_T: torch.Tensor, positions_T: torch.Tensor, rows_N: torch.Tensor, step: object
) -> torch.Tensor:
    """One flat forward: token ids and positions [T], rows whose logits are wanted [N] -> logits [N, V]."""
    logits: torch.Tensor = model(
        input_ids=ids_T[None],
        position_ids=positions_T[None],
        use_cache=False,
        logits_to_keep=rows_N,
        attention_step=step,
    ).logits
    return logits[0]


def _context_length(config: PreTrainedConfig, asked: int | None) -> int:
    """The model's own limit, or the shorter one asked for."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if limit is None:
        if asked is None:
            raise UnsupportedModel("the model's config states no context length; set --max-model-len")
        return asked
    if asked is not None and asked > limit:
        raise UnsupportedModel(f"--max-model-len {asked} is beyond the model's {limit} tokens")
    return asked or int(limit)


def _refuse_by_config(config: PreTrainedConfig, max_model_len: int) -> None:
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModel("encoder-decoder models are not supported")
    text = config.get_text_config()
    for rope in _rope_settings(getattr(text, "rope_parameters", None)):
        kind = rope.get("rope_type", "default")
        if kind not in ("dynamic", "longrope"):
            continue
        # These take their frequencies from the longest position in the batch: beyond the original length a
        # sequence's result would depend on its neighbours.
        original = (
            rope.get("original_max_position_embeddings")
            or getattr(text, "original_max_position_embeddings", None)
            or text.max_position_embeddings
        )
        if max_model_len > original:
            raise UnsupportedModel(
                f"{kind} RoPE is supported up to the model's original {original} tokens; "
                f"set --max-model-len {original} or less"
            )


def _rope_settings(parameters: Any) -> Iterator[dict[str, Any]]:
    """The RoPE settings of a config: one dict, or one for each kind of layer."""
    if not isinstance(parameters, dict):
        return
    if "rope_type" in parameters or "rope_theta" in parameters:
        yield parameters
    for value in parameters.values():
        yield from _rope_settings(value)


def _eos_token_ids(settings: Settings, config: PreTrainedConfig) -> tuple[int, ...]:
    eos = config.get_text_config().eos_token_id
    folder = Path(settings.model)
    if not folder.is_dir() or (folder / "generation_config.json").exists():
        try:
            generation = GenerationConfig.from_pretrained(settings.model, revision=settings.revision)
            eos = generation.eos_token_id if generation.eos_token_id is not None else eos
        except OSError:  # a hub model without one
            log.debug("no generation_config.json; eos comes from config.json")
    if eos is None:
        return ()
    return tuple(eos) if isinstance(eos, list | tuple) else (int(eos),)
