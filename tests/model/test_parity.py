"""A mixed batch gives every request the tokens that transformers + PEFT give it alone (greedy, float32)."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from server.devices.cpu import native
from tests.engine.harness import assert_at_rest, make_engine
from tests.model.tiny_models import ARCHITECTURES, VOCAB, Job, add_adapter, build, expected, serve, targets_of


@pytest.fixture(params=list(ARCHITECTURES))
def model_and_jobs(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, list[Job]]:
    architecture = request.param
    model = build(architecture, tmp_path / "model")
    targets = targets_of(architecture)
    few = [name for name in targets if name in ("q_proj", "v_proj", "qkv_proj")]
    adapters = [
        add_adapter(model, tmp_path / "all", seed=1, rank=8, target_modules=targets),
        add_adapter(model, tmp_path / "few", seed=2, rank=5, target_modules=few, use_rslora=True),
        add_adapter(
            model,
            tmp_path / "patterned",
            seed=3,
            rank=4,
            target_modules=targets,
            rank_pattern={targets[0]: 16, "layers.1.self_attn.o_proj": 2},
            alpha_pattern={targets[0]: 3},
        ),
    ]
    rng = random.Random(7)
    lengths = [3, 40, 1, 17, 25, 33, 9, 2]
    choices = [None, adapters[0], adapters[1], adapters[2], adapters[0], None, adapters[2], adapters[1]]
    return model, [
        Job([rng.randrange(3, VOCAB) for _ in range(length)], adapter, tokens=6 + 3 * (i % 3))
        for i, (length, adapter) in enumerate(zip(lengths, choices, strict=True))
    ]


def test_mixed_batches_equal_transformers_and_peft(model_and_jobs: tuple[Path, list[Job]]) -> None:
    model, jobs = model_and_jobs
    want = expected(model, jobs)
    # A budget of 24 tokens a step makes the longer prompts come in chunks, beside decoding neighbours.
    engine = make_engine(model, max_num_batched_tokens=24, max_num_seqs=6, block_size=8)
    assert serve(engine, jobs) == want
    assert_at_rest(engine)
    engine.close()


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")  # PEFT's advice on merging
def test_an_adapter_on_a_tied_output_head(tmp_path: Path) -> None:
    model = build("llama", tmp_path / "model", tie_word_embeddings=True)
    adapter = add_adapter(model, tmp_path / "a", seed=1, rank=4, target_modules=["lm_head", "o_proj"])
    rng = random.Random(1)
    jobs = [Job([rng.randrange(3, VOCAB) for _ in range(9)], who, 8) for who in (adapter, None, adapter)]
    engine = make_engine(model, max_num_batched_tokens=16)
    got = serve(engine, jobs)
    engine.close()
    assert got == expected(model, jobs)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "phi3", "gpt_oss"])
@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")  # PEFT's advice on merging
@pytest.mark.filterwarnings("ignore:Adapter 'default'.*invalid shape")  # PEFT 0.21 of any bias that it saves
def test_a_bias_in_lora_b(architecture: str, tmp_path: Path) -> None:
    """Beside adapters without one, on layers with and without a bias of their own, fused or not."""
    model = build(architecture, tmp_path / "model")
    options = {"rank": 4, "target_modules": targets_of(architecture)}
    plain = add_adapter(model, tmp_path / "plain", seed=1, **options)
    biased = add_adapter(model, tmp_path / "biased", seed=2, lora_bias=True, lora_alpha=12, **options)
    rng = random.Random(3)
    choices = [biased, None, plain, biased]
    jobs = [Job([rng.randrange(3, VOCAB) for _ in range(9 + i)], who, 8) for i, who in enumerate(choices)]
    want = expected(model, jobs)
    for attention in ("auto", "reference"):
        engine = make_engine(model, max_num_batched_tokens=16, attention=attention)
        assert serve(engine, jobs) == want
        engine.close()


@pytest.fixture
def no_compiled_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on a machine without a compiler, or whose processor can run none of the builds."""
    monkeypatch.setattr(native, "libraries", lambda: iter(()))
    native.library.cache_clear()
    yield
    native.library.cache_clear()


@pytest.mark.usefixtures("no_compiled_kernels")
def test_without_compiled_kernels_torch_serves_the_same_tokens(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = build("llama", tmp_path / "model")
    adapter = add_adapter(model, tmp_path / "a", seed=1, rank=4, target_modules=targets_of("llama"))
    rng = random.Random(2)
    jobs = [Job([rng.randrange(3, VOCAB) for _ in range(9)], who, 6) for who in (adapter, None, adapter)]
    engine = make_engine(model, max_num_batched_tokens=16)
    assert not engine._runner.fused
    assert "no compiled CPU kernels for this machine; using the slower torch paths" in caplog.text
    got = serve(engine, jobs)
    engine.close()
    assert got == expected(model, jobs)
