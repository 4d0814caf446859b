"""The engine under test: random weights in a real shape, and as many adapter versions as are asked for.

Versions of one rank share one folder on disk, under digests of their own: the engine cannot know, and treats
each as an adapter by itself (its own look whether the files are what they were, its own read, host image and
room in the arena), while writing them takes seconds. The operating system's page cache therefore serves every
read: "from disk" means from there here.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from load_tests import floor
from load_tests.adapters import write_adapters
from load_tests.gpu.figures import Deadline
from server.config import Settings
from server.engine.engine import Engine, create_engine
from server.messages import (
    AdapterRef,
    AdapterResult,
    LoadAdapter,
    Request,
    SamplingParams,
    TokenOutput,
)
from server.peft.digest import read_digest

_LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "rms_norm_eps": 1e-5}
_QWEN = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "rms_norm_eps": 1e-6}
SHAPES: dict[str, dict[str, object]] = {
    "llama-3.1-8b": _LLAMA
    | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
    | {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256}
    | {"max_position_embeddings": 8192, "tie_word_embeddings": False},
    "qwen2.5-0.5b": _QWEN
    | {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24}
    | {"num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151936}
    | {"max_position_embeddings": 8192, "tie_word_embeddings": True},
    "tiny": _LLAMA
    | {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    | {"num_key_value_heads": 2, "vocab_size": 512, "max_position_embeddings": 2048}
    | {"tie_word_embeddings": False},
}
MAX_MODEL_LEN = 2048  # tokens
_WIDTH = 2  # bytes of a bfloat16
_SPARE_TOKENS = 64  # KV room of each sequence beyond its tokens: its last block, and those held back


class SlowEngine(RuntimeError):
    """On CUDA the engine runs without one of its fast paths: its times would say nothing of Chorus."""


@dataclass(frozen=True)
class Version:
    """An adapter version of its own."""

    rank: int
    number: int = 0


Mix = Sequence[Version | None]  # what each sequence of a batch uses; None: the base model


@dataclass(frozen=True)
class Subject:
    """An engine, its base model's config, and where an adapter of each rank lies. One thread drives it."""

    shape: str
    engine: Engine
    config: dict[str, Any]
    folders: dict[int, Path]
    contents: dict[int, str]  # digests of what lies there
    _calls: Iterator[int] = field(default_factory=count)

    @property
    def about(self) -> dict[str, object]:
        """For the JSON of a part that measures it."""
        info = self.engine.info
        return {
            "shape": self.shape,
            "device": info.device,
            "weights_bytes": info.weights_bytes,
            "fast_paths": self.engine.fast_paths,
        }

    @property
    def head(self) -> str:
        """One line: what is measured, and on which paths it runs."""
        info, paths = self.engine.info, self.engine.fast_paths
        on = ", ".join(f"{name} {'yes' if there else 'NO'}" for name, there in paths.items())
        return f"{self.shape} on {info.device}, {info.weights_bytes / 1e9:.1f} GB; {on}"

    def require_fast_paths(self) -> None:
        """Raises SlowEngine on CUDA where fused layers, the flat model or captured steps are not in use."""
        paths = self.engine.fast_paths
        missing = [name for name in ("fused", "flat", "graphs") if not paths[name]]
        if missing and self.engine.info.device.startswith("cuda"):
            raise SlowEngine(f"the engine runs without {', '.join(missing)}; its log says why")

    def ref(self, version: Version) -> AdapterRef:
        rank, name = version.rank, f"rank-{version.rank}-{version.number}"
        return AdapterRef(name, str(self.folders[rank]), content=self.contents[rank])

    def call(self, version: Version) -> LoadAdapter:
        """A call to bring it into the arena, with a number of its own."""
        return LoadAdapter(next(self._calls), self.ref(version))

    def add(self, version: Version | None, prompt: int, output: int, **sampling: float) -> str:
        """Put a request of so many tokens in line, greedy unless `sampling` says more; returns its id."""
        number = next(self._calls)
        ids = [(7 * number + 13 * place) % 500 + 5 for place in range(prompt)]
        params = SamplingParams(**{"max_tokens": output, "temperature": 0.0, "ignore_eos": True} | sampling)
        refs = () if version is None else (self.ref(version),)
        self.engine.add(Request(f"request-{number}", ids, params, refs))
        return f"request-{number}"

    def turn(self) -> tuple[list[TokenOutput], list[AdapterResult]]:
        """A step; where all there is waits for an adapter, once that has landed.

        Raises RuntimeError when a request or a call ends with an error.
        """
        if wait_ms := self.engine.idle_ms():
            self.engine.wait(wait_ms / 1000)
        outputs, results = self.engine.step()
        answers: list[TokenOutput | AdapterResult] = [*outputs, *results]
        for answer in answers:
            if answer.error is not None:
                raise RuntimeError(f"{answer.error}: {answer.message}")
        return outputs, results

    def begin(self, ids: Sequence[str]) -> None:
        """Steps until each of these has its first token."""
        waiting = set(ids)
        while waiting:
            waiting.difference_update(token.request_id for token in self.turn()[0])

    def bring(self, version: Version) -> float:
        """Into the arena, while nothing else goes on; returns the seconds of work that its answer states."""
        call = self.call(version)
        self.engine.load_adapter(call)
        while True:
            for result in self.turn()[1]:
                if result.call_id == call.call_id:
                    return result.milliseconds / 1000

    def load(self, versions: Iterable[Version], deadline: Deadline | None = None) -> bool:
        """Bring them in, one after the other; False when the deadline came first.

        One at a time, so that a single piece of page-locked memory serves all where no images are kept.
        """
        for version in dict.fromkeys(versions):
            if deadline is not None and deadline.over:
                return False
            self.bring(version)
        return True

    def adapter_bytes(self, rank: int) -> int:
        """Of one adapter, in the arena or on the host."""
        return _WIDTH * floor.adapter_values(self.config, rank)

    def step_bytes(self, mix: Mix, context: float) -> floor.StepBytes:
        """What a decode step of the mix must read: weights, each distinct adapter and the live KV, once.

        An embedding that is not the output head as well is left out, as in `load_tests.floor`: a step looks
        up a row of it for each sequence. `context`: tokens of each sequence, on average.
        """
        weights = self.engine.info.weights_bytes
        if not self.config["tie_word_embeddings"]:
            weights -= _WIDTH * floor.head_values(self.config)
        adapters = sum(self.adapter_bytes(version.rank) for version in set(mix) if version is not None)
        kv = round(_WIDTH * floor.kv_values(self.config) * context * len(mix))
        return floor.StepBytes(weights, adapters, kv)


def adapter_bytes(shape: str, rank: int) -> int:
    """Of one adapter on all seven projections of all layers, in the arena or on the host."""
    return _WIDTH * floor.adapter_values(SHAPES[shape], rank)


@contextmanager
def subject(
    shape: str,
    *,
    ranks: Iterable[int],
    arena_ranks: int,
    max_num_seqs: int,
    kv_tokens: int,
    host_bytes: int = 0,
    cuda_levers: str = "",
) -> Iterator[Subject]:
    """An engine with random weights, with folders for versions of `ranks`. Raises SlowEngine.

    `arena_ranks`: what the ranks of all adapters in the arena may add up to. `kv_tokens`: room of the KV
    cache for each of `max_num_seqs` sequences. `host_bytes`: of the cache of packed adapters.
    `cuda_levers`: as the setting; "": what the environment says.
    """
    config = SHAPES[shape] | {"dtype": "bfloat16"}
    with tempfile.TemporaryDirectory() as root:
        model = Path(root) / "model"
        model.mkdir()
        (model / "config.json").write_text(json.dumps(config))
        different = sorted(set(ranks))
        names = [f"rank-{rank}" for rank in different]
        folders = write_adapters(model, Path(root) / "adapters", names, different, dtype="bfloat16")
        by_rank = dict(zip(different, folders, strict=True))
        engine = create_engine(
            Settings(
                model=str(model),
                load_format="dummy",
                dtype="bfloat16",
                max_num_seqs=max_num_seqs,
                max_model_len=MAX_MODEL_LEN,
                arena_bytes=adapter_bytes(shape, arena_ranks),
                kv_cache_bytes=_WIDTH * floor.kv_values(config) * (kv_tokens + _SPARE_TOKENS) * max_num_seqs,
                host_cache_bytes=host_bytes,
                prefix_caching=False,
                **({"cuda_levers": cuda_levers} if cuda_levers else {}),  # else as the environment has it
            )
        )
        try:
            contents = {rank: read_digest(folder) for rank, folder in by_rank.items()}
            on = Subject(shape, engine, config, by_rank, contents)
            on.require_fast_paths()
            yield on
        finally:
            engine.close()
