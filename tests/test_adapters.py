"""LoRA adapters: merged exactly, bases found, and what does not fit refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoint import write_tiny_folder
from tiny_v1 import write_tiny_v1

from qwen.errors import CheckpointDamaged, CheckpointError, CheckpointUnsupported, OutOfMemory
from qwen.loading import load_folder, load_model
from qwen.placement import Placement

RANK, ALPHA = 4, 12
IDS = torch.arange(40)[None]
TARGETS = {"qwen": ("attn.c_attn", "mlp.c_proj"), "qwen2": ("self_attn.q_proj", "mlp.down_proj")}
LAYERS = {"qwen": "transformer.h", "qwen2": "model.layers"}


def write_adapter(folder: Path, base: Path, *, named: str | None = None, **changes: object) -> Path:
    """Write an adapter in peft's format by hand: random A and B for two matrices of each layer."""
    config = json.loads((base / "config.json").read_text())
    kind = config["model_type"]
    weights = load_file(base / "model.safetensors")
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for layer in range(config["num_hidden_layers"]):
        for target in TARGETS[kind]:
            name = f"{LAYERS[kind]}.{layer}.{target}"
            rows, columns = weights[f"{name}.weight"].shape
            for part, shape in (("A", (RANK, columns)), ("B", (rows, RANK))):
                key = f"base_model.model.{name}.lora_{part}.weight"
                tensors[key] = torch.randn(shape, generator=generator) * 0.2
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {
        "peft_type": "LORA",
        "base_model_name_or_path": named if named is not None else str(base),
        "r": RANK,
        "lora_alpha": ALPHA,
        "target_modules": [target.rpartition(".")[2] for target in TARGETS[kind]],
        "bias": "none",
    }
    if kind == "qwen":  # c_proj of the attention is another module of that name
        settings["target_modules"] = list(TARGETS[kind])
    (folder / "adapter_config.json").write_text(json.dumps(settings | changes))
    return folder


def edit_config(adapter: Path, **changes: object) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(adapter: Path, change: object) -> None:
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)  # type: ignore[operator]
    save_file(tensors, path)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {"qwen": write_tiny_v1(folder / "v1"), "qwen2": write_tiny_folder(folder / "v2")}


@pytest.fixture
def adapter(bases: dict[str, Path], tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "adapter", bases["qwen2"])


@torch.no_grad()
def logits(model: object) -> torch.Tensor:
    return model(IDS).logits  # type: ignore[operator]


@pytest.mark.parametrize("kind", ["qwen", "qwen2"])
def test_merged_adapter_is_base_plus_scaled_product(
    bases: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    adapter = write_adapter(tmp_path / "mine", bases[kind])
    loaded = load_model(str(adapter), device="cpu", dtype="float32")
    base, _ = load_folder(bases[kind])
    plain = logits(base)
    updates = load_file(adapter / "adapter_model.safetensors")
    for key in (key for key in updates if "lora_A" in key):
        name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        product = updates[key.replace("lora_A", "lora_B")] @ updates[key]
        base.get_submodule(name).weight.data += product * (ALPHA / RANK)
    torch.testing.assert_close(logits(loaded.model), logits(base), atol=2e-5, rtol=1e-5)
    assert (logits(base) - plain).abs().max() > 0.1
    assert type(loaded.model) is type(base)
    names = {name for name, _ in loaded.model.named_parameters()}
    assert names == {name for name, _ in base.named_parameters()}
    assert loaded.name == "mine"
    assert f"merged into its base model {bases[kind].name}" in loaded.notices[0]


def test_base_is_found_beside_the_adapter_before_the_working_directory(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(bases["qwen"], tmp_path / "base")
    shutil.copytree(bases["qwen"], tmp_path / "only_here")
    monkeypatch.chdir(tmp_path)
    beside = write_adapter(tmp_path / "out" / "beside", bases["qwen2"], named="base")
    shutil.copytree(bases["qwen2"], beside / "base")
    assert load_model(str(beside), device="cpu").model.config.model_type == "qwen2"
    write_adapter(tmp_path / "out" / "working", bases["qwen"], named="only_here")
    assert load_model("out/working", device="cpu").model.config.model_type == "qwen"


def test_adapters_own_tokenizer_wins(bases: dict[str, Path], adapter: Path, tmp_path: Path) -> None:
    assert load_model(str(adapter), device="cpu").tokenizer.chat_template
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(bases["qwen2"] / name, adapter)
    path = adapter / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token": "<|endoftext|>"}))
    assert load_model(str(adapter), device="cpu").tokenizer.eos_token == "<|endoftext|>"


def test_trained_embedding_and_head_are_taken_over(bases: dict[str, Path], adapter: Path) -> None:
    weights = load_file(bases["qwen2"] / "model.safetensors")
    new = {
        f"base_model.model.{name}.weight": weights[f"{name}.weight"] * 2
        for name in ("model.embed_tokens", "lm_head")
    }
    edit_weights(adapter, lambda tensors: tensors.update(new))
    edit_config(adapter, modules_to_save=["embed_tokens", "lm_head"])
    model = load_model(str(adapter), device="cpu", dtype="float32").model
    for name in ("model.embed_tokens", "lm_head"):
        assert torch.equal(model.get_submodule(name).weight, weights[f"{name}.weight"] * 2)


# What is refused


@pytest.mark.parametrize("named", ["../gone", "/no/such/model", "out/gone"])
def test_missing_base_is_named_with_the_places_looked_at(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: str
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    adapter = write_adapter(tmp_path / "adapter", bases["qwen2"], named=named)
    with pytest.raises(CheckpointError) as caught:
        load_model(str(adapter), device="cpu")
    text = str(caught.value)
    assert "base_model_name_or_path" in text and named in text
    if not named.startswith("/"):
        assert str(adapter / named) in text and str(Path.cwd() / named) in text


@pytest.mark.parametrize("named", ["", None, 7, "auto"])
def test_base_without_a_name_is_refused(adapter: Path, named: object) -> None:
    edit_config(adapter, base_model_name_or_path=named)
    with pytest.raises(CheckpointDamaged, match="names no base model"):
        load_model(str(adapter), device="cpu")


@pytest.mark.parametrize("kind", ["PREFIX_TUNING", "IA3", None])
def test_other_kind_than_lora_is_refused_by_name(adapter: Path, kind: object) -> None:
    edit_config(adapter, peft_type=kind)
    with pytest.raises(CheckpointUnsupported, match=f"of the kind {kind}"):
        load_model(str(adapter), device="cpu")


@pytest.mark.parametrize("content", ["", "{", "[]"])
def test_damaged_configuration_is_named(adapter: Path, content: str) -> None:
    (adapter / "adapter_config.json").write_text(content)
    with pytest.raises(CheckpointDamaged, match=r"adapter_config\.json"):
        load_model(str(adapter), device="cpu")


def test_missing_weights_are_named(adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointDamaged, match=r"lacks adapter_model\.safetensors"):
        load_model(str(adapter), device="cpu")


def test_cut_weights_are_damage(adapter: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(CheckpointDamaged, match="cannot be applied"):
        load_model(str(adapter), device="cpu")


def test_missing_and_surplus_tensors_are_named(adapter: Path) -> None:
    name = "base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"
    edit_weights(adapter, lambda tensors: tensors.update(other=tensors.pop(name)))
    with pytest.raises(CheckpointDamaged, match=r"lacks the tensor .*layers\.1\.mlp\.down_proj"):
        load_model(str(adapter), device="cpu")
    edit_weights(adapter, lambda tensors: tensors.update({name: tensors["other"].clone()}))
    with pytest.raises(CheckpointDamaged, match="no place for: other"):
        load_model(str(adapter), device="cpu")


def test_adapter_of_another_model_is_refused(bases: dict[str, Path], adapter: Path) -> None:
    edit_config(adapter, r=RANK * 2)  # other shapes
    with pytest.raises(CheckpointDamaged, match="size mismatch"):
        load_model(str(adapter), device="cpu")
    edit_config(adapter, r=RANK, base_model_name_or_path=str(bases["qwen"]))  # other modules
    with pytest.raises(CheckpointDamaged, match="not found in the base model"):
        load_model(str(adapter), device="cpu")


def test_adapter_of_an_adapter_is_refused(bases: dict[str, Path], adapter: Path) -> None:
    second = write_adapter(adapter.parent / "second", bases["qwen2"], named=str(adapter))
    with pytest.raises(CheckpointUnsupported, match="an adapter itself"):
        load_model(str(second), device="cpu")


def test_quantised_base_is_refused(bases: dict[str, Path], adapter: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(bases["qwen2"], tmp_path / "int4"))
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (base / "config.json").write_text(json.dumps(config))
    edit_config(adapter, base_model_name_or_path=str(base))
    with pytest.raises(CheckpointUnsupported, match="unquantised"):
        load_folder(base, adapter=adapter)


def test_adapter_is_not_merged_into_weights_on_disk(
    bases: dict[str, Path], adapter: Path, tmp_path: Path
) -> None:
    on_disk = Placement({"": "disk"}, offload_folder=tmp_path / "offload")
    with pytest.raises(OutOfMemory, match="merged while its base model fits"):
        load_folder(bases["qwen2"], placement=on_disk, adapter=adapter)


def test_whole_model_with_an_adapter_beside_it_is_refused(
    bases: dict[str, Path], adapter: Path
) -> None:
    shutil.copytree(bases["qwen2"], adapter, dirs_exist_ok=True)
    with pytest.raises(CheckpointUnsupported, match="beside a whole model"):
        load_model(str(adapter), device="cpu")
