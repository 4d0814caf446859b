"""The whole engine on random weights in a real shape: decode step and prefill times, base against adapters.

    python -m load_tests.gpu.engine --shape llama-3.1-8b --batches 1,16,64

Rows: `base` (no adapter), `one` (all sequences use one adapter), `distinct` (each its own). A decode step
must read the weights, each distinct adapter in use and the live KV entries once; `of floor` is that many
bytes at the measured copy rate, over the time taken. Runs on a CPU too (`--shape tiny`), without the floor.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

from load_tests.adapters import write_adapters
from load_tests.gpu.timing import copy_rate
from server.config import Settings
from server.engine.engine import Engine, create_engine
from server.engine.messages import AdapterRef, LoadAdapter, Request, SamplingParams

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
    | {"num_key_value_heads": 2, "vocab_size": 512, "max_position_embeddings": 2048},
}
_FOLDERS = 4  # adapters on disk; more versions share their content, which the engine cannot know


def make_engine(shape: str, root: Path, batch: int, rank: int) -> tuple[Engine, list[AdapterRef]]:
    """An engine on dummy weights with `batch` distinct adapters in its arena."""
    model = root / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(SHAPES[shape] | {"dtype": "bfloat16"}))
    names = [f"a{i}" for i in range(_FOLDERS)]
    folders = list(write_adapters(model, root / "adapters", names, [rank], dtype="bfloat16"))
    refs = [AdapterRef(f"version-{i}", str(folders[i % _FOLDERS])) for i in range(batch)]
    cuda = torch.cuda.is_available()
    engine = create_engine(
        Settings(
            model=str(model),
            load_format="dummy",
            dtype="bfloat16",
            max_num_seqs=max(batch, 1),
            max_model_len=2048,
            arena_bytes=(16 if cuda else 1) * 2**30,
            kv_cache_bytes=(24 if cuda else 1) * 2**30,
            prefix_caching=False,
        )
    )
    for i, ref in enumerate(refs):
        engine.load_adapter(LoadAdapter(i, ref))
        while (idle_ms := engine.idle_ms()) is not None:
            time.sleep(idle_ms / 1000)  # the loader's thread wants the interpreter
            for answer in engine.step()[1]:
                assert answer.error is None, answer.message
    return engine, refs


def measure(
    engine: Engine, refs: list[AdapterRef | None], prompt: int, output: int, tag: str
) -> tuple[float, float]:
    """Seconds of the whole prefill, and the median decode step, of one sequence for each of `refs`.

    An entry of None is the base model.
    """
    sampling = SamplingParams(max_tokens=output, temperature=0.0, ignore_eos=True)
    for i, ref in enumerate(refs):
        ids = [(7 * i + 13 * j) % 500 + 5 for j in range(prompt)]
        engine.add(Request(f"{tag}-{i}", ids, sampling, () if ref is None else (ref,)))
    start = time.perf_counter()
    first_tokens = 0
    while first_tokens < len(refs):
        first_tokens += len(engine.step()[0])
    prefill = time.perf_counter() - start
    steps = []
    while engine.idle_ms() is not None:
        start = time.perf_counter()
        engine.step()
        steps.append(time.perf_counter() - start)
    return prefill, statistics.median(steps)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.1-8b")
    parser.add_argument("--batches", default="1,16,64", help="sequences at once")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=128, help="tokens")
    parser.add_argument("--output", type=int, default=32, help="tokens")
    parser.add_argument("--json", type=Path, help="write the rows here too")
    args = parser.parse_args()
    batches = [int(batch) for batch in args.batches.split(",")]
    rate = copy_rate() if torch.cuda.is_available() else None  # bytes/s, read and written counted alike
    rows = []
    with tempfile.TemporaryDirectory() as root:
        engine, refs = make_engine(args.shape, Path(root), max(batches), args.rank)
        info = engine.info
        widths = [t.in_features + t.out_features for t in info.lora_targets if "lm_head" not in t.name]
        each = 2 * args.rank * sum(widths)  # bytes of one adapter
        kv_token = info.kv_bytes / (info.kv_blocks * info.block_size)
        print(
            f"{args.shape} on {info.device}: {info.weights_bytes / 1e9:.1f} GB, adapter {each / 1e6:.0f} MB"
        )
        for batch in batches:
            mixes: dict[str, list[AdapterRef | None]] = {"base": [None] * batch}
            mixes |= {"one": [refs[0]] * batch, "distinct": list(refs[:batch])}
            for name, mix in mixes.items():
                measure(engine, mix, args.prompt, 4, f"warm-{name}-{batch}")
                prefill, step = measure(engine, mix, args.prompt, args.output, f"{name}-{batch}")
                used = {"base": 0, "one": 1, "distinct": batch}[name]
                live = kv_token * batch * (args.prompt + args.output / 2)
                floor = None if rate is None else (info.weights_bytes + used * each + live) / rate
                row = {"batch": batch, "adapters": name, "prefill_s": prefill, "step_s": step}
                rows.append(row | {"floor_s": floor})
                share = "" if floor is None else f"  {floor / step:6.1%} of floor"
                print(
                    f"batch {batch:4d} {name:9s} prefill {batch * args.prompt / prefill:10.0f} tok/s"
                    f"  decode {1e3 * step:8.2f} ms/step{share}",
                    flush=True,
                )
        engine.close()
    if args.json:
        args.json.write_text(json.dumps({"shape": args.shape, "rank": args.rank, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
