import json
import math
import struct
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from server.errors import InvalidAdapter, TooLarge, UnsupportedMedia
from server.messages import LoraTarget
from server.peft.format import LoraAdapter, check_finite, judge
from tests.lora.adapter_folder import LIMITS, TARGETS, config, file_of, safetensors, weights, write

Q0_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
Q0_B = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"


def judged(folder: Path) -> LoraAdapter:
    return judge(folder, TARGETS, LIMITS)


def refused(folder: Path, param: str, *words: str, kind: type = InvalidAdapter) -> None:
    with pytest.raises(kind) as caught:
        judged(folder)
    assert caught.value.param == param
    for word in (*words, param):
        assert word in caught.value.message
    assert str(folder) not in caught.value.message


def test_a_sound_adapter(tmp_path):
    adapter = judged(write(tmp_path))
    assert [module.target for module in adapter.modules] == list(range(6))
    assert [module.name for module in adapter.modules] == [target.name for target in TARGETS]
    assert {module.rank for module in adapter.modules} == {4}
    assert {module.scaling for module in adapter.modules} == {1.5}
    assert (adapter.rank, adapter.alpha) == (4, 6)
    assert adapter.target_modules == ("down_proj", "q_proj", "v_proj")
    assert adapter.parameters == sum(4 * (t.in_features + t.out_features) for t in TARGETS)
    assert adapter.weight_bytes == 4 * adapter.parameters
    check_finite(tmp_path, adapter)


def test_spans_point_at_the_tensors(tmp_path):
    tensors = weights()
    folder = write(tmp_path, tensors, dtype={Q0_A: "BF16"})
    adapter = judged(folder)
    raw = (folder / "adapter_model.safetensors").read_bytes()
    span = adapter.modules[0].b
    assert span.dtype == "float32"
    assert raw[span.offset : span.offset + span.nbytes] == tensors[Q0_B].tobytes()
    assert (adapter.modules[0].a.dtype, adapter.modules[0].a.nbytes) == ("bfloat16", 2 * 4 * 12)


def test_names_with_the_adapters_own_name(tmp_path):
    tensors = {name.replace(".weight", ".default.weight"): t for name, t in weights().items()}
    assert len(judged(write(tmp_path, tensors)).modules) == 6


@pytest.mark.parametrize(
    "name",
    [
        "base_model.model.lm_head.base_layer.weight",  # lm_head or embed_tokens is a target
        "base_model.model.lm_head.weight",  # the vocabulary was resized, or save_embedding_layers=True
        "base_model.model.model.embed_tokens.weight",
        "base_model.model.model.layers.0.self_attn.q_proj.base_layer.bias",
    ],
)
def test_copies_of_base_weights(tmp_path, name):
    """PEFT would load them over the base model's own, which here belong to all adapters."""
    copy = {name: np.zeros((8, 12), np.float32)}
    refused(write(tmp_path, weights() | copy), name, "base model", "save_embedding_layers=False")


def test_modules_come_in_the_order_of_the_targets(tmp_path):
    tensors = dict(reversed(weights().items()))
    assert [module.target for module in judged(write(tmp_path, tensors)).modules] == list(range(6))


def test_an_adapter_may_touch_some_layers_only(tmp_path):
    adapter = judged(write(tmp_path, weights(TARGETS[3:4])))
    assert [module.target for module in adapter.modules] == [3]


@pytest.mark.parametrize(
    "fields",
    [
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 8, "layers.1.mlp.down_proj": 2}, "alpha_pattern": {"v_proj": 3}},
        {
            "rank_pattern": {r".*\.0\..*_proj": 2},
            "alpha_pattern": {"^model.layers.0.*": 1},
            "use_rslora": True,
        },
        {"rank_pattern": {"model.layers.0.self_attn.q_proj": 16, "q_proj": 3}},  # the first that matches
        {"lora_alpha": 6 * math.sqrt(2)},  # as PEFT writes after converting rsLoRA
    ],
)
def test_rank_and_scaling_are_what_peft_makes_of_them(tmp_path, fields):
    """The oracle is PEFT's own layer construction on modules of the same names."""
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")

    class Base(torch.nn.Module):
        def __init__(self):
            super().__init__()
            for target in TARGETS:
                parent = self
                *path, last = target.name.split(".")
                for part in path:
                    if part not in parent._modules:
                        parent.add_module(part, torch.nn.Module())
                    parent = parent._modules[part]
                parent.add_module(last, torch.nn.Linear(target.in_features, target.out_features))

    model = peft.get_peft_model(Base(), peft.LoraConfig(**config(task_type=None, **fields)))
    model.save_pretrained(tmp_path)
    adapter = judged(tmp_path)
    assert len(adapter.modules) == len(TARGETS)
    for module in adapter.modules:
        layer = model.base_model.model.get_submodule(module.name)
        assert module.rank == layer.r["default"]
        assert module.scaling == pytest.approx(layer.scaling["default"], rel=1e-12)
    assert adapter.rank == max(module.rank for module in adapter.modules)


@pytest.mark.parametrize(
    "targets",
    [
        "all-linear",
        r".*\.(self_attn\.(q|v)_proj|mlp\.down_proj)",
        [target.name for target in TARGETS],
        ["self_attn.q_proj", "v_proj", "mlp.down_proj"],
    ],
)
def test_ways_to_name_target_modules(tmp_path, targets):
    assert len(judged(write(tmp_path, fields={"target_modules": targets})).modules) == 6


@pytest.mark.parametrize("init", [True, False, None, "gaussian", "eva", "orthogonal", "mica"])
def test_starts_that_leave_the_base_alone(tmp_path, init):
    judged(write(tmp_path, fields={"init_lora_weights": init}))


def test_every_default_of_peft_is_accepted(tmp_path):
    peft = pytest.importorskip("peft")
    fields = peft.LoraConfig(target_modules=["q_proj", "v_proj", "down_proj"]).to_dict()
    fields |= {"target_modules": ["q_proj", "v_proj", "down_proj"], "r": 4, "peft_type": "LORA"}
    judged(write(tmp_path, fields=fields))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("peft_type", "IA3"),
        ("peft_type", None),
        ("task_type", "SEQ_CLS"),
        ("bias", "all"),
        ("bias", "lora_only"),
        ("use_dora", True),
        ("modules_to_save", ["lm_head"]),
        ("trainable_token_indices", [1, 2]),
        ("layer_replication", [[0, 1]]),
        ("alora_invocation_tokens", [7]),
        ("lora_bias", "yes"),
        ("megatron_config", {"a": 1}),
        ("use_qalora", True),
        ("target_parameters", ["experts.gate_up_proj"]),
        ("use_bdlora", {"nblocks": 2}),
        ("arrow_config", {"top_k": 2}),
        ("kasa_config", {"beta": 1}),
        ("monteclora_config", {"a": 1}),
        ("velora_config", {"scale": 1.0}),
        ("fan_in_fan_out", True),
        ("a_field_of_the_future", True),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "pissa_niter_16"),
        ("init_lora_weights", "OLoRA"),
        ("init_lora_weights", "corda"),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", "lora_ga"),
        ("r", 0),
        ("r", -1),
        ("r", 4.0),
        ("r", True),
        ("r", 10**400),
        ("r", None),
        ("lora_alpha", None),
        ("lora_alpha", "16"),
        ("lora_alpha", 1e300),
        ("lora_alpha", True),
        ("use_rslora", "yes"),
        ("rank_pattern", ["q_proj"]),
        ("rank_pattern", {"(": 4}),
        ("alpha_pattern", {"*": 4}),
        ("target_modules", None),
        ("target_modules", []),
        ("target_modules", [1]),
        ("target_modules", "("),
    ],
)
def test_refused_by_name_of_the_field(tmp_path, field, value):
    refused(write(tmp_path, fields={field: value}), field)


def test_every_field_of_peft_is_judged(tmp_path):
    """A field that a new PEFT adds is refused when it is set: nothing passes in silence."""
    peft = pytest.importorskip("peft")
    harmless = {
        "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
        "lora_dropout", "layers_to_transform", "layers_pattern", "megatron_core", "loftq_config",
        "eva_config", "corda_config", "lora_ga_config", "runtime_config", "qalora_group_size",
        "ensure_weight_tying",
    }  # fmt: skip
    for field in set(peft.LoraConfig.__dataclass_fields__) - harmless:
        value = {"init_lora_weights": "pissa", "exclude_modules": "(", "target_modules": "("}
        refused(write(tmp_path, fields={field: value.get(field, "odd")}), field)


def test_pattern_values_are_numbers(tmp_path):
    refused(write(tmp_path, fields={"rank_pattern": {"q_proj": 0}}), "rank_pattern[q_proj]")
    refused(write(tmp_path, fields={"alpha_pattern": {"q_proj": "a"}}), "alpha_pattern[q_proj]")


def test_a_pattern_matches_whole_parts_of_a_name_only(tmp_path):
    adapter = judged(write(tmp_path, fields={"rank_pattern": {"proj": 9, "attn.q_proj": 9, "q_pro": 9}}))
    assert {module.rank for module in adapter.modules} == {4}


@pytest.mark.parametrize("pattern", [r"(.|.)*(?=Z)", r"(\w|\.|\w\w|.\w)+(?<!j)"])
def test_a_pattern_that_backtracks_for_ever_is_stopped(tmp_path, monkeypatch, pattern):
    monkeypatch.setattr("server.peft.patterns._SECONDS", 0.2)
    refused(write(tmp_path, fields={"target_modules": pattern}), "target_modules", "too long")
    refused(write(tmp_path, fields={"rank_pattern": {pattern: 4}}), "rank_pattern", "too long")


@pytest.mark.parametrize(
    "pattern", ["((a{1000}){1000}){1000}", "(x{ 99999})", "(?:a{0,9}){99}{99}{99}", "a" * 10_001]
)
def test_a_pattern_that_is_huge_once_compiled(tmp_path, pattern):
    refused(write(tmp_path, fields={"target_modules": pattern}), "target_modules", "too large")


@pytest.mark.parametrize(
    "pattern",
    [
        "(?R)|x", "(?:.|(?R))*(?=Z)", "(?1)(a)", "(?P<n>a)(?&n)", "(?P>n)", r"\L<names>", "(?:q_proj){e<=2}",
        "(?b)(?:q_proj){i}", r"\p{L}+", "(?<=a*)b", "(?|a|b)", "(*FAIL)", r"\K", "(?V1)[a--b]", "(?r)a",
        "a{x}",
    ],
)  # fmt: skip
@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"])
def test_patterns_that_re_does_not_know(tmp_path, field, pattern):
    """PEFT would refuse them too; some cost memory that no timeout bounds."""
    value = {pattern: 4} if field.endswith("pattern") else pattern
    refused(write(tmp_path, fields={field: value}), field)


@pytest.mark.parametrize(
    "pattern",
    [r".*\.(?:q|v|down)_proj", r"(?i).*_PROJ", r".*(?<!x)_pro[a-j]{1,2}", r"(?P<l>.*)_(?>proj)(?(l)|x)"],
)
def test_patterns_that_re_knows(tmp_path, pattern):
    assert len(judged(write(tmp_path, fields={"target_modules": pattern})).modules) == 6


def test_too_many_patterns(tmp_path):
    many = {f"a{i}": 4 for i in range(2_001)}
    judged(write(tmp_path, fields={"rank_pattern": dict(list(many.items())[:1_000])}))
    refused(
        write(tmp_path, fields={"rank_pattern": many, "alpha_pattern": many}), "alpha_pattern", "too many"
    )
    long = {f"{i}" + "a" * 9_000: 4 for i in range(45)}
    refused(write(tmp_path, fields={"rank_pattern": long}), "rank_pattern", "too many")


@pytest.mark.parametrize("value", [[[]] * 20_000, [{}] * 20_000, {str(i): 0 for i in range(20_000)}])
def test_a_config_of_too_many_values(tmp_path, value):
    refused(write(tmp_path, fields={"loftq_config": value}), "adapter_config.json", "values")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"r": NaN}', '{"r": 1, "r": 2}', "[" * 100_000, "\xff"]
)
def test_a_config_that_is_not_json(tmp_path, text):
    write(tmp_path)
    (tmp_path / "adapter_config.json").write_bytes(text.encode("latin-1"))
    refused(tmp_path, "adapter_config.json")


def test_half_of_a_surrogate_pair_never_gets_in(tmp_path):
    write(tmp_path)
    text = json.dumps(config()).replace("CAUSAL_LM", "\\ud800")
    (tmp_path / "adapter_config.json").write_text(text)
    refused(tmp_path, "adapter_config.json")


def test_a_huge_config(tmp_path):
    refused(write(tmp_path, fields={"revision": "x" * (1 << 20)}), "adapter_config.json", kind=TooLarge)


def test_missing_files(tmp_path):
    refused(tmp_path / "nothing", "adapter_config.json", "missing")
    write(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    refused(tmp_path, "adapter_model.safetensors", "missing")


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt"])
def test_only_a_pickle(tmp_path, name):
    write(tmp_path)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / name)
    refused(tmp_path, "adapter_model.safetensors", kind=UnsupportedMedia)


def test_wrong_shapes(tmp_path):
    refused(write(tmp_path, weights(rank=5)), Q0_A, "[5, 12]", "[4, 12]")
    wide = weights() | {Q0_B: np.zeros((21, 4), np.float32)}
    refused(write(tmp_path, wide), Q0_B, "[21, 4]", "[20, 4]")
    refused(write(tmp_path, weights() | {Q0_A: np.zeros(48, np.float32)}), Q0_A, "[48]")


def test_tensors_that_do_not_belong(tmp_path):
    extra = np.zeros((4, 4), np.float32)
    for name in (
        "base_model.model.model.embed_tokens.lora_embedding_A",
        "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector.weight",
        "base_model.model.model.layers.0.self_attn.q_proj.lora_B.bias",
        "base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight",
        "base_model.model.lm_head.weight",
        "model.layers.0.self_attn.q_proj.lora_A.weight",
    ):
        refused(write(tmp_path, weights() | {name: extra}), name)


def test_a_layer_that_the_base_model_lacks(tmp_path):
    tensors = weights([LoraTarget("model.layers.9.self_attn.q_proj", 12, 20)])
    name = "base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight"
    refused(write(tmp_path, tensors), name, "not a Linear layer")


def test_a_bias_of_b(tmp_path):
    adapter = judged(write(tmp_path, weights(bias=True), {"lora_bias": True}))
    assert [module.bias.shape for module in adapter.modules] == [(t.out_features,) for t in TARGETS]
    assert adapter.parameters == sum(4 * (t.in_features + t.out_features) + t.out_features for t in TARGETS)
    assert adapter.weight_bytes == 4 * adapter.parameters
    named = {name.replace("lora_B.", "lora_B.default."): t for name, t in weights(bias=True).items()}
    assert judged(write(tmp_path, named, {"lora_bias": True})).modules[0].bias is not None


def test_a_bias_that_is_not_as_the_config_says(tmp_path):
    q0_bias = Q0_B.replace("weight", "bias")
    refused(write(tmp_path, weights(bias=True)), q0_bias, "lora_bias")
    refused(write(tmp_path, weights(), {"lora_bias": True}), Q0_A, "no partner lora_B.bias")
    short = weights(bias=True) | {q0_bias: np.zeros(19, np.float32)}
    refused(write(tmp_path, short, {"lora_bias": True}), q0_bias, "[19]", "[20]")
    spoilt = weights(bias=True) | {q0_bias: np.full(20, np.nan, np.float32)}
    adapter = judged(write(tmp_path, spoilt, {"lora_bias": True}))
    with pytest.raises(InvalidAdapter, match=r"lora_B\.bias"):
        check_finite(tmp_path, adapter)


def test_a_missing_partner(tmp_path):
    tensors = weights()
    del tensors[Q0_B]
    refused(write(tmp_path, tensors), Q0_A, "no partner lora_B")


def test_the_same_tensor_twice(tmp_path):
    name = Q0_A.replace(".weight", ".default.weight")
    tensors = weights()
    refused(write(tmp_path, tensors | {name: tensors[Q0_A]}), name, "twice")


def test_a_module_that_the_config_leaves_out(tmp_path):
    v0_a = Q0_A.replace("q_proj", "v_proj")
    refused(write(tmp_path, fields={"target_modules": ["q_proj", "down_proj"]}), v0_a, "target_modules")
    refused(write(tmp_path, fields={"exclude_modules": ["v_proj"]}), v0_a, "exclude_modules")
    refused(write(tmp_path, fields={"exclude_modules": r".*\.v_proj"}), v0_a, "exclude_modules")


def test_unknown_dtypes(tmp_path):
    refused(write(tmp_path, dtype={Q0_A: "F64"}), Q0_A, "F64", "BF16")


ENTRY = b'{"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}'


def entry(shape: object = (1,), offsets: object = (0, 4), dtype: object = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    ("header", "data", "param"),
    [
        ({}, 0, "adapter_model.safetensors"),
        ({"__metadata__": {"a": "b"}}, 0, "adapter_model.safetensors"),
        ({"x": 1}, 4, "x"),
        ({"x": entry(dtype=[])}, 4, "x"),
        ({"x": entry(shape=4)}, 4, "x"),
        ({"x": entry(shape=[-1])}, 4, "x"),
        ({"x": entry(shape=[True])}, 4, "x"),
        ({"x": entry(shape=[2**61, 8])}, 4, "x"),
        ({"x": entry(shape=[1] * 9)}, 4, "x"),
        ({"x": entry(offsets=[0])}, 4, "x"),
        ({"x": entry(offsets=[4, 0])}, 4, "x"),
        ({"x": entry(offsets=[0, 8])}, 8, "x"),
        ({"x": entry(offsets=[4, 8])}, 8, "x"),  # a hole in front
        ({"x": entry(), "y": entry()}, 8, "y"),  # overlap
        ({"x": entry(), "y": entry(offsets=[8, 12])}, 12, "y"),  # a hole between
        ({"x": entry()}, 8, "adapter_model.safetensors"),  # bytes after the last
        ({"x": entry()}, 2, "adapter_model.safetensors"),  # cut short
    ],
)
def test_malformed_headers(tmp_path, header, data, param):
    write(tmp_path)
    raw = file_of(json.dumps(header).encode(), bytes(data))
    (tmp_path / "adapter_model.safetensors").write_bytes(raw)
    refused(tmp_path, param)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\0\0",
        struct.pack("<Q", 2**63),
        struct.pack("<Q", 100) + b"{}",
        file_of(b"[]"),
        file_of(b"{"),
        file_of(b'{"x": ENTRY, "x": ENTRY}'.replace(b"ENTRY", ENTRY), bytes(4)),
        file_of(ENTRY.join([b'{"x": ', b', "x": ', b"}"]).replace(b"data_o", b"data\\u005fo", 1), bytes(4)),
        file_of(b'{"__metadata__": ' + b"[" * 100_000),
        file_of(b'{"__metadata__": {' + b'"a": "",' * 11_000 + b'"b": ""}, "x": ' + ENTRY + b"}", bytes(4)),
        file_of(b"{" + b'"a": 1,' * 11_000 + b'"b": 1}'),
        file_of(b'{"x": {"dtype": "F32", "shape": [' + b"0," * 12_000 + b'0], "data_offsets": [0, 0]}}'),
        file_of(b"\xff\xfe"),
        file_of(b"[" * 100_000),
        file_of(b" " * (1 << 20) + b"{}"),  # over the cap that `judged` sets
        safetensors({f"t{i}": np.zeros(1) for i in range(102)}),  # and over its count
    ],
)
def test_files_that_are_not_safetensors(tmp_path, raw):
    write(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(raw)
    refused(tmp_path, "adapter_model.safetensors")


def test_a_long_name_is_cut_in_the_message(tmp_path):
    with pytest.raises(InvalidAdapter) as caught:
        judged(write(tmp_path, {"x" * 10_000: np.zeros(1)}))
    assert len(caught.value.message) < 500


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_not_finite(tmp_path, dtype, value):
    name = "base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"
    tensors = weights()
    tensors[name][11, 3] = value  # the very last weight of the file
    adapter = judged(write(tmp_path, tensors, dtype=dtype))
    with pytest.raises(InvalidAdapter) as caught:
        check_finite(tmp_path, adapter)
    assert caught.value.param == name


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_the_largest_weights_are_finite(tmp_path, dtype):
    tensors = weights()
    tensors[Q0_A][:] = 65_504.0 if dtype == "F16" else 3.38e38
    check_finite(tmp_path, judged(write(tmp_path, tensors, dtype=dtype)))


def test_tensors_of_several_chunks_are_read_to_the_end(tmp_path):
    target = LoraTarget("model.layers.0.self_attn.q_proj", 100_000, 20)
    tensors = weights([target], rank=4)
    tensors[Q0_A][3, -1] = np.inf
    write(tmp_path, tensors)
    adapter = judge(tmp_path, [target], LIMITS)
    with pytest.raises(InvalidAdapter) as caught:
        check_finite(tmp_path, adapter)
    assert caught.value.param == Q0_A


def test_a_file_that_shrank_since(tmp_path):
    adapter = judged(write(tmp_path))
    with (tmp_path / "adapter_model.safetensors").open("r+b") as file:
        file.truncate(adapter.modules[-1].b.offset)
    with pytest.raises(InvalidAdapter):
        check_finite(tmp_path, adapter)


def test_reading_adapters_imports_no_torch():
    code = "import sys, server.peft.format; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    file=st.sampled_from(["adapter_config.json", "adapter_model.safetensors"]),
    edits=st.lists(st.tuples(st.floats(0, 1), st.binary(max_size=8)), min_size=1, max_size=5),
)
def test_whatever_comes_is_judged_or_refused(tmp_path, file, edits):
    write(tmp_path)
    raw = bytearray((tmp_path / file).read_bytes())
    size = int.from_bytes(raw[:8], "little") if file.endswith("safetensors") else len(raw)
    for at, data in edits:
        place = int(at * size)
        raw[place : place + len(data)] = data
    (tmp_path / file).write_bytes(raw)
    with suppress(InvalidAdapter, UnsupportedMedia):
        assert judged(tmp_path).modules


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    header=st.dictionaries(
        st.text(max_size=8) | st.just("__metadata__") | st.just(Q0_A),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets"]), inner)
            ),
        ),
        max_size=4,
    )
)
def test_any_header_is_refused_or_means_what_it_says(tmp_path, header):
    write(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(file_of(json.dumps(header).encode(), b""))
    with suppress(InvalidAdapter):
        assert judged(tmp_path).parameters == 0
