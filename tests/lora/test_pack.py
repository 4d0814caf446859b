from types import SimpleNamespace

import numpy as np
import pytest
import torch

from server.errors import InvalidAdapter
from server.lora.arena import Arena
from server.lora.kernels.interface import Part
from server.lora.kernels.reference import ReferenceKernels
from server.lora.layout import Layout, RecentLayouts
from server.lora.pack import pack
from server.lora.segments import Segments
from server.messages import LoraTarget
from server.peft.format import judge
from tests.lora.adapter_folder import LIMITS, TARGETS, weights, write
from tests.lora.image import packed
from tests.lora.kernels import apply

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def stored(tensor: np.ndarray, dtype: str) -> torch.Tensor:
    """What a tensor of the file holds, as float32."""
    exact = torch.from_numpy(tensor)
    if dtype == "BF16":  # the test's writer truncates
        return (exact.view(torch.int32) & -65536).view(torch.float32)
    return exact.to(DTYPES[dtype]).float()


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_every_tensor_lies_where_the_offsets_say(tmp_path, dtype, base):
    """B is transposed and, as its bias, scaled in float32, then rounded once; A is rounded only."""
    tensors = weights(TARGETS[1:], rank=3, bias=True)
    write(tmp_path, tensors, {"r": 3, "lora_alpha": 7, "lora_bias": True}, dtype)
    image = packed(tmp_path, dtype=base)
    assert image.layout.ranks.tolist() == [0, 3, 3, 3, 3, 3]
    for module, target in list(enumerate(TARGETS))[1:]:
        a_start, b_start, gain_start, bias_start = image.layout.offsets[module].tolist()
        assert gain_start == -1
        assert all(start * base.itemsize % 64 == 0 for start in (a_start, b_start, bias_start))
        a = stored(tensors[f"base_model.model.{target.name}.lora_A.weight"], dtype)
        b = stored(tensors[f"base_model.model.{target.name}.lora_B.weight"], dtype)
        assert torch.equal(image.data[a_start : a_start + a.numel()], a.flatten().to(base))
        expected = (b * (7 / 3)).T.to(base).flatten()
        assert torch.equal(image.data[b_start : b_start + b.numel()], expected)
        bias = stored(tensors[f"base_model.model.{target.name}.lora_B.bias"], dtype)
        assert torch.equal(image.data[bias_start : bias_start + bias.numel()], (bias * (7 / 3)).to(base))


def test_tensors_larger_than_one_torch_operation(tmp_path):
    target = LoraTarget("model.layers.0.self_attn.q_proj", 9_000, 11_000)
    tensors = weights([target], rank=4)
    write(tmp_path, tensors)
    for base in (torch.float32, torch.bfloat16):
        image = packed(tmp_path, [target], base)
        a, b = (torch.from_numpy(tensor) for tensor in tensors.values())
        a_start, b_start = image.layout.offsets[0, : Part.GAIN].tolist()
        assert torch.equal(image.data[a_start : a_start + a.numel()], a.flatten().to(base))
        expected = (b * 1.5).T.flatten().to(base)
        assert torch.equal(image.data[b_start : b_start + b.numel()], expected)


def test_the_size_is_known_before_anything_is_read(tmp_path):
    adapter = judge(write(tmp_path, weights(rank=3), {"r": 3}), TARGETS, LIMITS)
    for base in (torch.float32, torch.bfloat16):
        layout = Layout.of(adapter, TARGETS, base)
        assert layout.nbytes % 64 == 0
        assert layout.nbytes > adapter.parameters * base.itemsize  # the room between tensors as well
        pack(tmp_path, layout, torch.empty(layout.nbytes, dtype=torch.uint8).view(base))


@pytest.mark.parametrize("bias", [False, True])
def test_a_layout_says_of_every_module_what_the_judgement_said(tmp_path, bias):
    tensors = weights(bias=bias)
    kinds = {name: ("BF16", "F16", "F32")[n % 3] for n, name in enumerate(tensors)}
    adapter = judge(write(tmp_path, tensors, {"lora_bias": bias}, kinds), TARGETS, LIMITS)
    modules = Layout.of(adapter, TARGETS, torch.float16).modules()
    for module, judged in zip(modules, adapter.modules, strict=True):
        assert len(module.spans) == len(judged.spans) == 2 + bias
        for span, was in zip(module.spans, judged.spans, strict=True):
            assert (span.dtype, span.shape, span.offset) == (was.dtype, was.shape, was.offset)
            assert span.nbytes == was.nbytes
            assert span.name in was.name
        assert (module.target, module.rank, module.scaling) == (judged.target, judged.rank, judged.scaling)
        assert module.name == judged.name


def test_recent_layouts_are_those_loaded_last(tmp_path):
    layout = packed(write(tmp_path)).layout
    layouts = RecentLayouts(2)
    for digest in "aba":
        layouts.remember(digest, layout)
    layouts.remember("c", layout)
    assert ["a" in layouts, "b" in layouts, "c" in layouts] == [True, False, True]
    layouts.forget("a")
    layouts.forget("a")
    assert layouts.get("a") is None
    assert layouts["c"] is layout


def test_equal_adapters_have_equal_images(tmp_path):
    """No byte of the image is left to chance, the room between tensors included."""
    write(tmp_path, weights(rank=3, bias=True), {"r": 3, "lora_bias": True})
    first, *others = (packed(tmp_path, dtype=torch.bfloat16).data for _ in range(5))
    assert all(torch.equal(image, first) for image in others)  # and there is no NaN, which equals nothing


def test_a_file_that_is_not_what_was_judged(tmp_path):
    layout = packed(write(tmp_path)).layout
    weights_file = tmp_path / "adapter_model.safetensors"
    whole = weights_file.read_bytes()
    for content in (whole[:-4], whole + b"more", b""):
        weights_file.write_bytes(content)
        with pytest.raises(InvalidAdapter, match=f"has {len(content)} bytes, it had {len(whole)}"):
            pack(tmp_path, layout, torch.empty(layout.elements))


def test_a_file_that_is_cut_short_while_it_is_read(tmp_path, monkeypatch):
    layout = packed(write(tmp_path)).layout
    monkeypatch.setattr("server.lora.pack.os.fstat", lambda fd: SimpleNamespace(st_size=layout.file_bytes))
    with (tmp_path / "adapter_model.safetensors").open("r+b") as file:
        file.truncate(layout.file_bytes - 4)
    with pytest.raises(InvalidAdapter, match=r"down_proj\.lora_B"):
        pack(tmp_path, layout, torch.empty(layout.elements))


@pytest.mark.parametrize(
    "fields",
    [
        {"r": 4, "target_modules": "all-linear"},
        {"r": 8, "lora_alpha": 3, "use_rslora": True, "target_modules": ["q_proj", "down_proj"]},
        {
            "r": 2,
            "rank_pattern": {"q_proj": 5, "layers.1.mlp.down_proj": 16},
            "alpha_pattern": {"v_proj": 1, ".*down_proj": 9},
            "target_modules": ["q_proj", "v_proj", "down_proj"],
        },
        {"r": 4, "lora_alpha": 7, "lora_bias": True, "target_modules": ["q_proj", "down_proj"]},
    ],
)
@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")  # PEFT's advice on merging
@pytest.mark.filterwarnings("ignore:Adapter 'default'.*invalid shape")  # PEFT 0.21 of any bias that it saves
def test_deltas_in_the_arena_are_those_of_peft(tmp_path, fields):
    """A tiny Llama: every Linear's output with the packed adapter is what PEFT's own layer gives."""
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    base = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=64,
        )
    )
    linears = {n: m for n, m in base.named_modules() if isinstance(m, torch.nn.Linear)}
    targets = [LoraTarget(name, linear.in_features, linear.out_features) for name, linear in linears.items()]
    model = peft.get_peft_model(
        base, peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **fields)
    )
    model.save_pretrained(tmp_path)
    adapter = judge(tmp_path, targets, LIMITS)
    image = packed(tmp_path, targets)
    arena = Arena(2 * image.layout.nbytes, len(targets), torch.float32)
    extent = arena.reserve(image.layout.nbytes)
    arena.room(extent).copy_(image.data)
    segments = Segments.build([(((arena.commit(extent, image.layout), 1.0),), 5)])
    touched = {module.target for module in adapter.modules}
    for module, target in enumerate(targets):
        layer = model.base_model.model.get_submodule(target.name)
        x = torch.randn(5, target.in_features)
        with torch.no_grad():
            plain = linears[target.name](x)
            out = plain.clone()
            apply(ReferenceKernels(), out, x, module, segments, arena.view())
            torch.testing.assert_close(out, layer(x))
        assert torch.equal(out, plain) == (module not in touched)
