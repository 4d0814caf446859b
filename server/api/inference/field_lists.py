"""Fields that other servers document and that ask for nothing with the values listed here.

`null` and what is empty ask for nothing whatever the field is called (`asks_for_nothing`).
"""

from __future__ import annotations

from collections.abc import Mapping

_OFF = (False,)
_ON = (True,)

# OpenAI's API as of openai-python 3.54.
OPENAI: Mapping[str, tuple[object, ...]] = {
    "suffix": (),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "moderation": (),
    "verbosity": ("medium",),
    "service_tier": ("auto", "default"),
}
# vLLM 0.11 to 0.15, completions and chat.
VLLM: Mapping[str, tuple[object, ...]] = {
    "use_beam_search": _OFF,
    "length_penalty": (1, 1.0),
    "early_stopping": _OFF,
    "spaces_between_special_tokens": _ON,
    "watermarking": _OFF,
    "logprob_token_ids": (),
    "prompt_embeds": (),
    "logits_processors": (),
    "mm_processor_kwargs": (),
    "media_io_kwargs": (),
    "kv_transfer_params": (),
    "ec_transfer_params": (),
    "vllm_xargs": (),
    "repetition_detection": (),
    "thinking_token_budget": (-1,),
    "stream_interval": (1,),
    "routed_experts_prompt_start": (0,),
    "return_token_offsets": _OFF,
    "return_mm_kwargs": _ON,
    "return_prompt_text": _OFF,
}
# SGLang 0.5, completions and chat.
SGLANG: Mapping[str, tuple[object, ...]] = {
    "return_hidden_states": _OFF,
    "return_routed_experts": _OFF,
    "routed_experts_start_len": (0,),
    "return_cached_tokens_details": _OFF,
    "return_prompt_token_ids": _OFF,
    "return_meta_info": _OFF,
    "stop_regex": (),
    "no_stop_trim": _OFF,
    "session_params": (),
    "custom_logit_processor": (),
    "custom_params": (),
    "custom_labels": (),
    "images_config": (),
    "input_ids": (),
    "task": (),
    "extra_key": (),
    "ngram_corpus_id": (),
    "max_dynamic_patch": (),
    "min_dynamic_patch": (),
    "use_audio_in_video": _OFF,
    "bootstrap_host": (),
    "bootstrap_port": (),
    "bootstrap_room": (),
    "routed_dp_rank": (),
    "disagg_prefill_dp_rank": (),
    "data_parallel_rank": (),
}
NEUTRAL: Mapping[str, tuple[object, ...]] = {**OPENAI, **VLLM, **SGLANG}


def asks_for_nothing(value: object) -> bool:
    """Of a field, whatever it is called."""
    return value is None or (isinstance(value, str | list | dict) and not value)


def is_neutral(value: object, values: tuple[object, ...]) -> bool:
    """Whether it is one of `values`, of the same kind: 1 is not True."""
    return any(value == each and isinstance(value, bool) is isinstance(each, bool) for each in values)
