"""GPTQ checkpoints from folder to model, of both layouts, and every way in which one is wrong."""

from __future__ import annotations

import json
import logging
import re
import shutil
import sys
import textwrap
import threading

import pytest
import torch
from safetensors.torch import save_file
from tiny_checkpoint import write_tiny_folder
from tiny_gptq import PUBLISHED, WEIGHTS, edit_json, edit_tensors, quantize_folder
from tiny_layouts import to_qwen2, write_qwen1
from tiny_v1 import write_tiny_v1

from qwen import AutoModelForCausalLM
from qwen.errors import CheckpointDamaged, CheckpointUnsupported
from qwen.gptq_format import GptqConfig, LayerRule, pack_zeros
from qwen.gptq_loading import describe_weights
from qwen.load_options import LoadOptions
from qwen.loading import load_folder, load_model
from qwen.local import load_backend
from qwen.messages import ChatRequest, Message, SamplingParams
from qwen.quantized import Int4Linear

#: Mean error of the logits as a part of their spread; a dense model in bfloat16 has more than ours.
TOLERANCE = 0.05
LAYER = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Quantised folders and their dense twins, by layout."""
    folder = tmp_path_factory.mktemp("gptq")
    sources = {
        "qwen1": write_tiny_v1(folder / "source1"),
        "golden": write_qwen1(folder / "golden-source"),  # its MLP of 88 fits no kernel
        "qwen2": write_tiny_folder(folder / "source2"),
    }
    return {name: quantize_folder(source, folder / name) for name, source in sources.items()}


@pytest.fixture
def folder(pairs, tmp_path):
    """A copy to damage."""
    return shutil.copytree(pairs["qwen2"][0], tmp_path / "Tiny-Int4")


@torch.inference_mode()
def logits(model):
    return model(torch.arange(40)[None] % 200).logits.float()


def assert_close(actual, expected):
    assert (actual - expected).pow(2).mean().sqrt() < TOLERANCE * expected.std()


def layers_of(model, kind):
    return [name for name, module in model.named_modules() if isinstance(module, kind)]


@pytest.mark.parametrize("layout", ["qwen1", "qwen2", "golden"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_int4_model_answers_as_its_dense_twin(pairs, layout, dtype):
    quantised, twin = pairs[layout]
    model, _ = load_folder(quantised, dtype=dtype)
    dense, _ = load_folder(twin, dtype="float32")
    assert not model.training
    assert model.dtype == getattr(torch, dtype)
    assert_close(logits(model), logits(dense))
    assert not torch.equal(logits(model), logits(dense))


@pytest.mark.parametrize("layout", ["qwen1", "qwen2"])
def test_listed_layers_are_packed_and_the_rest_is_as_usual(pairs, layout):
    model, _ = load_folder(pairs[layout][0])
    linears = 5 if layout == "qwen1" else 7
    layers = model.config.num_hidden_layers
    assert len(layers_of(model, Int4Linear)) == linears * layers
    assert layers_of(model, torch.nn.Linear) == ["lm_head"]
    assert describe_weights(model) == "int4 (float32)"


def test_converted_v1_checkpoint_answers_alike(pairs, tmp_path):
    source = shutil.copytree(pairs["golden"][0], tmp_path / "v1")
    converted, _ = load_folder(to_qwen2(source))
    original, _ = load_folder(source)
    assert layers_of(converted, Int4Linear)
    assert_close(logits(converted), logits(original))


def test_published_scripts_load_int4_too(pairs):
    model = AutoModelForCausalLM.from_pretrained(
        pairs["qwen1"][0], device_map="cpu", trust_remote_code=True
    ).eval()
    assert layers_of(model, Int4Linear)
    dense, _ = load_folder(pairs["qwen1"][1])
    assert_close(logits(model), logits(dense))


@pytest.mark.parametrize("sym", [True, False])
def test_int8_is_unpacked_with_a_notice(tmp_path, sym):
    source = write_tiny_folder(tmp_path / "source")
    config = GptqConfig(bits=8, group_size=32, sym=sym)
    quantised, twin = quantize_folder(source, tmp_path / "int8", config)
    loaded = load_model(str(quantised), device="cpu", dtype="float32")
    assert "unpacked to float32" in loaded.notices[-1]
    assert describe_weights(loaded.model) == "float32"
    assert not layers_of(loaded.model, Int4Linear)
    assert torch.equal(logits(loaded.model), logits(load_folder(twin)[0]))


def test_sizes_that_no_kernel_takes_are_unpacked_and_logged(tmp_path, monkeypatch, caplog):
    source = write_tiny_folder(tmp_path / "source")
    quantised, twin = quantize_folder(source, tmp_path / "int4")
    monkeypatch.setattr(
        Int4Linear, "fits", staticmethod(lambda **sizes: sizes["out_features"] > 32)
    )
    with caplog.at_level(logging.WARNING):
        model, _ = load_folder(quantised)
    assert "64 inputs and 32 outputs" in caplog.text
    assert sum("k_proj" in name for name in layers_of(model, torch.nn.Linear)) == 2
    assert_close(logits(model), logits(load_folder(twin)[0]))


def test_bias_that_only_the_quantised_file_has_is_used(pairs, folder):
    before = logits(load_folder(folder)[0])
    edit_tensors(folder, lambda t: t[f"{LAYER}.bias"].fill_(0.5))
    model, _ = load_folder(folder)
    assert model.get_submodule(LAYER).bias is not None
    assert (logits(model) - before).abs().max() > 0.01
    assert load_folder(pairs["qwen2"][0])[0].get_submodule(LAYER).bias is None  # zeros cost time


def test_layer_left_dense_in_the_file_stays_dense(tmp_path):
    source = write_tiny_folder(tmp_path / "source")
    quantised, _ = quantize_folder(source, tmp_path / "some", only=re.compile(r"_proj\.weight$"))
    assert len(layers_of(load_folder(quantised)[0], torch.nn.Linear)) == 1
    some, twin = quantize_folder(source, tmp_path / "few", only=re.compile(r"mlp.*_proj\.weight$"))
    model, _ = load_folder(some)
    assert len(layers_of(model, torch.nn.Linear)) == 1 + 2 * 4
    assert_close(logits(model), logits(load_folder(twin)[0]))


def test_layers_of_other_bits_and_dense_ones_load_by_their_rules(tmp_path):
    rules = (
        LayerRule(re.compile(r".*\.up_proj"), None),
        LayerRule(re.compile(r"model\.layers\.0\.self_attn"), GptqConfig(8, 64)),
    )
    source = write_tiny_folder(tmp_path / "source")
    config = GptqConfig(group_size=32, rules=rules)
    quantised, twin = quantize_folder(source, tmp_path / "mixed", config)
    loaded = load_model(str(quantised), device="cpu", dtype="float32")
    model = loaded.model
    dense = {name.removeprefix("model.layers.") for name in layers_of(model, torch.nn.Linear)}
    attention = {f"0.self_attn.{part}_proj" for part in "qkvo"}
    assert dense == {*attention, "0.mlp.up_proj", "1.mlp.up_proj", "lm_head"}
    assert "4 of the 12 quantised layers have 8 bits" in loaded.notices[-1]
    assert_close(logits(model), logits(load_folder(twin)[0]))


def test_sharded_checkpoint_loads(pairs, folder):
    from safetensors.torch import load_file

    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names, index = sorted(tensors), {}
    for number, part in enumerate((names[::2], names[1::2])):
        file = f"model-{number}.safetensors"
        shard = {name: tensors[name] for name in part}
        save_file(shard, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(part, file)
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    assert torch.equal(logits(load_folder(folder)[0]), logits(load_folder(pairs["qwen2"][0])[0]))
    path = folder / "model-1.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointDamaged, match=r"model-1\.safetensors is damaged"):
        load_folder(folder)


def test_settings_beside_config_json_are_found(pairs, folder):
    edit_json(folder / "config.json", quantization_config=None)
    settings = {key: PUBLISHED[key] for key in ("bits", "sym", "desc_act")} | {"group_size": 32}
    (folder / "quantize_config.json").write_text(json.dumps(settings))
    assert torch.equal(logits(load_folder(folder)[0]), logits(load_folder(pairs["qwen2"][0])[0]))


def test_page_says_what_runs(folder):
    backend = load_backend(str(folder), LoadOptions(device="cpu", dtype="float32"))
    try:
        assert backend.info.dtype == "int4 (float32)"
        request = ChatRequest(
            messages=(Message("user", "Hi"),), params=SamplingParams(max_new_tokens=3)
        )
        events = list(backend.stream(request, threading.Event()))
        assert events[-1].usage.completion_tokens > 0
    finally:
        backend.close()


def test_packed_model_cannot_be_saved(pairs, tmp_path):
    model, _ = load_folder(pairs["qwen2"][0])
    with pytest.raises(ValueError, match="not serializable"):
        model.save_pretrained(tmp_path)


# What is wrong with a checkpoint


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"desc_act": True}, "desc_act"),
        ({"group_size": 16}, "groups of 16"),
        ({"bits": 3}, "3 bits"),
        ({"checkpoint_format": "gptq_v2"}, "gptq_v2"),
        ({"quant_method": "awq"}, "awq"),
    ],
)
def test_variants_that_are_not_run_are_refused(folder, changes, words):
    edit_json(folder / "config.json", quantization_config=PUBLISHED | changes)
    with pytest.raises(CheckpointUnsupported, match=words):
        load_folder(folder)


def test_quantised_file_named_as_dense_is_refused(folder):
    edit_json(folder / "config.json", quantization_config=None)
    with pytest.raises(CheckpointDamaged, match=r"quantised weights.*quantization_config"):
        load_folder(folder)


def test_dense_file_named_as_quantised_is_refused(pairs, tmp_path):
    folder = shutil.copytree(pairs["qwen2"][1], tmp_path / "dense")
    edit_json(folder / "config.json", quantization_config=PUBLISHED)
    with pytest.raises(CheckpointDamaged, match="but they are not"):
        load_folder(folder)


def set_tensor(name, change):
    def apply(tensors):
        tensors[name] = change(tensors[name]).contiguous()

    return apply


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda t: t.pop(f"{LAYER}.qzeros"), CheckpointDamaged, rf"{LAYER}\.qzeros is not there"),
        (lambda t: t.pop(f"{LAYER}.qweight"), CheckpointDamaged, rf"{LAYER}\.weight is"),
        (
            lambda t: t.pop("model.layers.0.self_attn.q_proj.bias"),
            CheckpointDamaged,
            r"q_proj\.bias is not there",
        ),
        (lambda t: t.pop("model.norm.weight"), CheckpointDamaged, r"model\.norm\.weight"),
        (set_tensor(f"{LAYER}.qweight", lambda q: q[:4]), CheckpointDamaged, r"qweight has the sh"),
        (set_tensor(f"{LAYER}.scales", lambda s: s[:1]), CheckpointDamaged, r"scales has the shap"),
        (
            set_tensor(f"{LAYER}.scales", lambda s: s * float("inf")),
            CheckpointDamaged,
            "no numbers",
        ),
        (set_tensor(f"{LAYER}.g_idx", lambda g: g.flip(0)), CheckpointUnsupported, r"g_idx groups"),
        (
            set_tensor(f"{LAYER}.qzeros", lambda z: pack_zeros(torch.full((2, 96), 9))),
            CheckpointUnsupported,
            "version 2",
        ),
        (
            lambda t: t.update({f"{LAYER}.weight": torch.zeros(96, 64)}),
            CheckpointDamaged,
            "twice",
        ),
        (
            lambda t: t.update({"model.other.qweight": torch.zeros(8, 96, dtype=torch.int32)}),
            CheckpointDamaged,
            r"model\.other\.qzeros is not there",
        ),
    ],
)
def test_tensors_that_are_wrong_are_named(folder, change, error, words):
    edit_tensors(folder, change)
    with pytest.raises(error, match=words):
        load_folder(folder)


def test_quantised_tensors_of_no_layer_are_named(folder):
    def add(tensors):
        for part in ("qweight", "qzeros", "scales"):
            tensors[f"model.other.{part}"] = tensors[f"{LAYER}.{part}"].clone()

    edit_tensors(folder, add)
    with pytest.raises(CheckpointDamaged, match=r"model\.other\.qweight .* no linear layer"):
        load_folder(folder)


def test_bits_that_do_not_fit_the_tensors_are_damage(folder):
    edit_json(folder / "config.json", quantization_config=PUBLISHED | {"bits": 8})
    with pytest.raises(CheckpointDamaged, match="8 bits ask for"):
        load_folder(folder)


# GPTQModel, by a stand-in for the package


STUB = {
    "__init__": "",
    "utils/__init__": "",
    "utils/importer": """
        from gptqmodel.layer import StubLinear
        def hf_select_quant_linear_v2(**asked):
            assert asked["pack"] is False and asked["format"] == "gptq"
            StubLinear.asked = asked
            return StubLinear
        """,
    "utils/model": """
        def hf_convert_gptq_v1_to_v2_format(model, bits, kernel, checkpoint_format, meta):
            assert checkpoint_format == "gptq"
        def hf_gptqmodel_post_init(model, use_act_order):
            for module in model.modules():
                if hasattr(module, "post_init"):
                    module.post_init()
        """,
    "layer": """
        import torch
        from qwen.gptq_format import GptqConfig, GptqTensors, dequantize
        class StubLinear(torch.nn.Module):
            BROKEN = False
            def __init__(self, *, bits, group_size, sym, desc_act, in_features, out_features, bias,
                         pack_dtype):
                super().__init__()
                self.config = GptqConfig(bits=bits, group_size=group_size, sym=sym)
                self.in_features, self.out_features = in_features, out_features
                self.ready, self.bias = 0, None
            def post_init(self):
                self.ready += 1
            def forward(self, x):
                if self.BROKEN:
                    raise RuntimeError("no compiler")
                assert self.ready == 1 and x.dtype == torch.bfloat16
                stored = GptqTensors(self.qweight, self.qzeros, self.scales, self.g_idx)
                y = x.float() @ dequantize(stored, self.config).t()
                return (y if self.bias is None else y + self.bias.float()).to(x.dtype)
        """,
}


@pytest.fixture
def gptqmodel(tmp_path, monkeypatch):
    """The stand-in's class of layers."""
    for name, code in STUB.items():
        path = tmp_path / "packages" / "gptqmodel" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(code))
    monkeypatch.syspath_prepend(tmp_path / "packages")
    for name in [name for name in sys.modules if name.split(".")[0] == "gptqmodel"]:
        monkeypatch.delitem(sys.modules, name)
    from gptqmodel.layer import StubLinear

    yield StubLinear
    for name in [name for name in sys.modules if name.split(".")[0] == "gptqmodel"]:
        del sys.modules[name]


@pytest.mark.parametrize("layout", ["qwen1", "qwen2"])
def test_kernels_of_gptqmodel_are_used_and_named_where_installed(pairs, layout, gptqmodel, caplog):
    quantised, twin = pairs[layout]
    with caplog.at_level(logging.INFO):
        loaded = load_model(str(quantised), device="cpu", dtype="float32")
    assert not layers_of(loaded.model, Int4Linear)
    assert len(layers_of(loaded.model, gptqmodel)) == (10 if layout == "qwen1" else 14)
    assert loaded.notices == ("The int4 weights run on GPTQModel's StubLinear.",)
    assert describe_weights(loaded.model) == "int4, GPTQModel StubLinear (float32)"
    assert "GPTQModel's StubLinear runs" in caplog.text
    assert_close(logits(loaded.model), logits(load_folder(twin)[0]))
    asked = gptqmodel.asked
    assert (asked["bits"], asked["group_size"], asked["dtype"]) == (4, 32, torch.bfloat16)


def test_gptqmodel_that_fails_leaves_the_work_to_torch(pairs, gptqmodel, caplog):
    gptqmodel.BROKEN = True
    loaded = load_model(str(pairs["qwen2"][0]), device="cpu", dtype="float32")
    assert len(layers_of(loaded.model, Int4Linear)) == 14
    assert "cannot be used" in loaded.notices[0]
    assert "no compiler" in caplog.text
    assert describe_weights(loaded.model) == "int4 (float32)"


# Real weights


@pytest.mark.integration
def test_real_weights_in_4_bits_keep_what_the_rounding_left(embedded_folder, tmp_path):
    config = GptqConfig(group_size=128)
    quantised, twin = quantize_folder(embedded_folder, tmp_path / "int4", config)
    model, tokenizer = load_folder(quantised, dtype="bfloat16")
    assert len(layers_of(model, Int4Linear)) == 7 * model.config.num_hidden_layers
    text = (
        "Water boils at 100 degrees Celsius at sea level. The capital of France is Paris, and the "
        "capital of Italy is Rome. In Python, a list is written in square brackets."
    )
    ids = tokenizer(text, return_tensors="pt").input_ids
    packed = mean_loss(model, ids)
    del model
    dense = mean_loss(load_folder(twin, dtype="float32")[0], ids)
    assert dense < 4  # sane: a uniform guess has 11.9
    assert abs(packed - dense) < 0.03


@torch.inference_mode()
def mean_loss(model, ids):
    scores = model(ids).logits[0, :-1].float()
    return float(torch.nn.functional.cross_entropy(scores, ids[0, 1:]))
