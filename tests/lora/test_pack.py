import numpy as np
import pytest
import torch

from server.engine.messages import LoraTarget
from server.lora.arena import Arena
from server.lora.kernels.reference import ReferenceKernels
from server.lora.pack import pack, packed_bytes
from server.lora.segments import Segments
from server.registry.peft_format import judge
from tests.lora.adapter_folder import TARGETS, weights, write

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
    """B is transposed and scaled in float32, then rounded once; A is rounded only."""
    tensors = weights(TARGETS[1:], rank=3)
    write(tmp_path, tensors, {"r": 3, "lora_alpha": 7}, dtype)
    adapter = judge(tmp_path, TARGETS)
    packed = pack(tmp_path, adapter, len(TARGETS), base, digest="d")
    assert packed.data.dtype == base
    assert packed.digest == "d"
    assert packed.ranks.tolist() == [0, 3, 3, 3, 3, 3]
    for module, target in list(enumerate(TARGETS))[1:]:
        a_start, b_start = packed.offsets[module].tolist()
        assert a_start * base.itemsize % 64 == b_start * base.itemsize % 64 == 0
        a = stored(tensors[f"base_model.model.{target.name}.lora_A.weight"], dtype)
        b = stored(tensors[f"base_model.model.{target.name}.lora_B.weight"], dtype)
        assert torch.equal(packed.data[a_start : a_start + a.numel()], a.flatten().to(base))
        expected = (b * (7 / 3)).T.to(base).flatten()
        assert torch.equal(packed.data[b_start : b_start + b.numel()], expected)


def test_tensors_larger_than_one_torch_operation(tmp_path):
    target = LoraTarget("model.layers.0.self_attn.q_proj", 9_000, 11_000)
    tensors = weights([target], rank=4)
    adapter = judge(write(tmp_path, tensors), [target])
    for base in (torch.float32, torch.bfloat16):
        packed = pack(tmp_path, adapter, 1, base)
        a, b = (torch.from_numpy(tensor) for tensor in tensors.values())
        a_start, b_start = packed.offsets[0].tolist()
        assert torch.equal(packed.data[a_start : a_start + a.numel()], a.flatten().to(base))
        expected = (b * 1.5).T.flatten().to(base)
        assert torch.equal(packed.data[b_start : b_start + b.numel()], expected)


def test_the_size_is_known_before_anything_is_read(tmp_path):
    adapter = judge(write(tmp_path), TARGETS)
    for base in (torch.float32, torch.bfloat16):
        packed = pack(tmp_path, adapter, len(TARGETS), base)
        assert packed.nbytes == packed_bytes(adapter, base) == packed.data.nbytes
        assert packed.nbytes % 64 == 0


def test_equal_adapters_have_equal_images(tmp_path):
    """No byte of the image is left to chance, the room between tensors included."""
    adapter = judge(write(tmp_path, weights(rank=3), {"r": 3}), TARGETS)
    images = [pack(tmp_path, adapter, len(TARGETS), torch.bfloat16).data for _ in range(5)]
    assert all(torch.equal(image.view(torch.int16), images[0].view(torch.int16)) for image in images)


def test_a_file_that_shrank_since_it_was_judged(tmp_path):
    adapter = judge(write(tmp_path), TARGETS)
    with (tmp_path / "adapter_model.safetensors").open("r+b") as file:
        file.truncate(adapter.modules[-1].b.offset + 4)
    with pytest.raises(OSError, match=r"down_proj\.lora_B"):
        pack(tmp_path, adapter, len(TARGETS), torch.float32)


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
    ],
)
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
    adapter = judge(tmp_path, targets)
    packed = pack(tmp_path, adapter, len(targets), torch.float32)
    arena = Arena(2 * packed.nbytes, len(targets), torch.float32)
    extent = arena.reserve(packed.nbytes)
    arena.room(extent).copy_(packed.data)
    segments = Segments.build([(((arena.commit(extent, packed), 1.0),), 5)])
    touched = {module.target for module in adapter.modules}
    for module, target in enumerate(targets):
        layer = model.base_model.model.get_submodule(target.name)
        x = torch.randn(5, target.in_features)
        with torch.no_grad():
            plain = linears[target.name](x)
            out = plain.clone()
            ReferenceKernels().apply(out, x, module, segments, arena.view())
            torch.testing.assert_close(out, layer(x))
        assert torch.equal(out, plain) == (module not in touched)
