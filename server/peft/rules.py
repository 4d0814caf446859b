"""What an adapter_config.json says: which adapters are refused, and each module's rank and scaling."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping

from server.peft.patterns import Pattern, Patterns, bad

_FILE = "adapter_config.json"
_MAX_VALUES = (
    20_000  # in all of its lists and objects: what a megabyte of them would cost is out of proportion
)

# Fields that change what an adapter computes in a way this server does not do. A value that is false, null
# or empty is fine.
_UNSUPPORTED = {
    "use_dora": "DoRA (a learned magnitude beside the low-rank delta)",
    "modules_to_save": "fully trained modules beside the low-rank deltas",
    "trainable_token_indices": "trained embedding rows",
    "layer_replication": "replicated layers",
    "alora_invocation_tokens": "activated LoRA",
    "megatron_config": "Megatron layers",
    "use_qalora": "QALoRA",
    "target_parameters": "LoRA on bare parameters (for example of experts)",
    "use_bdlora": "block-diagonal LoRA",
    "arrow_config": "Arrow routing",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "velora_config": "VeLoRA",
    "fan_in_fan_out": "layers that keep their weight transposed (fan_in_fan_out)",
}

# Fields read below, and fields that say how the adapter was made or trained but not what it computes.
_KNOWN = {
    "peft_type", "task_type", "bias", "init_lora_weights", "r", "lora_alpha", "rank_pattern", "alpha_pattern",
    "use_rslora", "lora_bias", "target_modules", "exclude_modules", "base_model_name_or_path",
    "auto_mapping", "peft_version", "revision", "inference_mode", "lora_dropout", "layers_to_transform",
    "layers_pattern", "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
    "qalora_group_size", "runtime_config", "ensure_weight_tying",
}  # fmt: skip

# These change the base weights at the start of training. PEFT resets the field to true when it saves an
# adapter converted for the unmodified base model, so a name that is still here means: not converted.
_INITS_THAT_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def parse_config(raw: bytes) -> dict[str, object]:
    """The fields of an adapter_config.json. Raises InvalidAdapter for what is no JSON object, has a key twice
    or holds more values than any adapter needs."""
    if sum(raw.count(mark) for mark in (b",", b"[", b"{")) > _MAX_VALUES:
        raise bad(_FILE, f"holds more than {_MAX_VALUES} values")
    try:
        value = json.loads(raw.decode(), object_pairs_hook=_unique, parse_constant=_no_constant)
        if b"\\ud" in raw.lower():
            json.dumps(value, ensure_ascii=False).encode()  # refuses half of a surrogate pair
    except RecursionError:
        raise bad(_FILE, "is nested too deeply") from None
    except ValueError as error:
        raise bad(_FILE, f"is not valid JSON: {str(error)[:200]}") from None
    if not isinstance(value, dict):
        raise bad(_FILE, "must be a JSON object")
    return value


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key appears twice")
    return result


def _no_constant(text: str) -> object:
    raise ValueError(f"{text} is not JSON")


def check_fields(config: Mapping[str, object]) -> None:
    """Refuse, by name, whatever would make it compute something else than `scaling * (B A x + bias)`."""
    if config.get("peft_type") != "LORA":
        raise bad("peft_type", "must be LORA")
    if config.get("task_type") not in (None, "CAUSAL_LM"):
        raise bad("task_type", "must be CAUSAL_LM or null")
    if config.get("bias") not in (None, "none"):
        raise bad("bias", "must be none: trained biases are not supported")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_INITS_THAT_CHANGE_THE_BASE):
        raise bad(
            "init_lora_weights",
            f"is {init[:40]!r}, which changes the base weights; save the adapter with PEFT's "
            "path_initial_model_for_weight_conversion to make it fit the unmodified base model",
        )
    for field, value in config.items():
        if field in _UNSUPPORTED and value:
            raise bad(field, f"is set: {_UNSUPPORTED[field]} is not supported")
        if field not in _UNSUPPORTED and field not in _KNOWN and value:
            raise bad(field, "is set, and this server does not know the field; remove it or set it to null")


class Rules:
    """What a config says of each module: targeted or not, rank, scaling (by PEFT's own matching rules)."""

    def __init__(self, config: Mapping[str, object]) -> None:
        self._patterns = Patterns()
        self.rank = _rank("r", config.get("r"))
        self.alpha = _alpha("lora_alpha", config.get("lora_alpha"))
        self._use_rslora = _flag("use_rslora", config.get("use_rslora"))
        self.lora_bias = _flag("lora_bias", config.get("lora_bias"))  # whether each lora_B has a bias
        ranks, alphas = (self._admit(field, config) for field in ("rank_pattern", "alpha_pattern"))
        self._ranks = [
            (
                self._patterns.compile("rank_pattern", key, tail=True),
                _rank(f"rank_pattern[{key[:100]}]", value),
            )
            for key, value in ranks
        ]
        self._alphas = [
            (
                self._patterns.compile("alpha_pattern", key, tail=True),
                _alpha(f"alpha_pattern[{key[:100]}]", value),
            )
            for key, value in alphas
        ]
        self._targets = self._selector("target_modules", config.get("target_modules"))
        excluded = config.get("exclude_modules")
        self._excluded = self._selector("exclude_modules", excluded) if excluded else frozenset[str]()

    def rank_and_scaling(self, module: str) -> tuple[int, float]:
        """PEFT's `get_pattern_key`: the first pattern in the file's order that matches wins."""
        rank, alpha = self.rank, self.alpha
        for pattern, pattern_rank in self._ranks:
            if pattern.matches(module):
                rank = pattern_rank
                break
        for pattern, pattern_alpha in self._alphas:
            if pattern.matches(module):
                alpha = pattern_alpha
                break
        return rank, alpha / math.sqrt(rank) if self._use_rslora else alpha / rank

    def targets(self, module: str) -> bool:
        """PEFT's `check_target_module_exists`, without layers_to_transform: there the tensors decide."""
        return not _selects(self._excluded, module) and _selects(self._targets, module)

    def _admit(self, field: str, config: Mapping[str, object]) -> list[tuple[str, object]]:
        patterns = config.get(field) or {}
        if not isinstance(patterns, dict):
            raise bad(field, "must be an object from module patterns to numbers")
        self._patterns.admit(field, patterns)
        return list(patterns.items())

    def _selector(self, field: str, value: object) -> frozenset[str] | Pattern:
        if field == "target_modules" and value == "all-linear":
            return self._patterns.compile(field, ".*")
        if isinstance(value, str) and value:
            return self._patterns.compile(field, value)
        if isinstance(value, list) and value and all(isinstance(name, str) for name in value):
            return frozenset(value)
        raise bad(field, "must be a list of module names, a regular expression or all-linear")


def _selects(selector: frozenset[str] | Pattern, module: str) -> bool:
    if not isinstance(selector, frozenset):
        return selector.matches(module)
    while module not in selector:  # the whole name, or one of its ends after a dot
        _, dot, module = module.partition(".")
        if not dot:
            return False
    return True


def _flag(field: str, value: object) -> bool:
    value = value or False
    if not isinstance(value, bool):
        raise bad(field, "must be true or false")
    return value


def _rank(field: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**31:
        raise bad(field, "must be a positive whole number")
    return value


def _alpha(field: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= 1e9:
        raise bad(field, "must be a finite number")
    return float(value)
