"""Loading: device and dtype, and every way in which a checkpoint can be wrong."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_checkpoint import write_tiny_folder, write_tiny_gguf

from qwen.errors import (
    CheckpointDamaged,
    CheckpointNotFound,
    CheckpointUnsupported,
    OutOfMemory,
)
from qwen.loading import choose_dtype, load_folder, load_model


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_folder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(original, tmp_path / "tiny"))


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def test_checkpoint_loads_ready_to_run(original: Path) -> None:
    import torch

    loaded = load_model(str(original), device="cpu", dtype="float32")
    assert loaded.name == "tiny"
    assert not loaded.model.training
    assert loaded.model.dtype == torch.float32
    assert loaded.model.config._attn_implementation == "sdpa"
    ids = loaded.tokenizer("Hi", return_tensors="pt").input_ids
    assert loaded.model(ids).logits.shape == (1, 2, 259)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_dtype_is_obeyed(original: Path, dtype: Any) -> None:
    loaded = load_model(str(original), device="cpu", dtype=dtype)
    assert str(loaded.model.dtype) == f"torch.{dtype}"


def test_gguf_file_loads(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "mine.gguf")
    loaded = load_model(str(path), device="cpu", dtype="float32", cache=tmp_path / "cache")
    assert loaded.name == "mine"
    assert loaded.tokenizer("ab").input_ids == [256]


def test_base_model_without_chat_template_loads(tmp_path: Path) -> None:
    folder = write_tiny_folder(tmp_path / "base", chat=False)
    assert load_model(str(folder), device="cpu").tokenizer.chat_template is None


def test_tied_model_is_not_taken_for_damaged(tmp_path: Path) -> None:
    folder = write_tiny_folder(tmp_path / "tied", tied=True)
    model, _ = load_folder(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize(
    ("choice", "has_cuda", "cpu_has_bfloat16", "expected"),
    [
        ("auto", True, False, "bfloat16"),
        ("auto", False, True, "bfloat16"),
        ("auto", False, False, "float32"),
        ("float16", True, True, "float16"),
        ("float32", True, True, "float32"),
    ],
)
def test_dtype_follows_the_hardware(
    choice: Any, has_cuda: bool, cpu_has_bfloat16: bool, expected: str
) -> None:
    chosen = choose_dtype(choice, has_cuda=has_cuda, cpu_has_bfloat16=cpu_has_bfloat16)
    assert chosen == expected


# Damage


def test_missing_folder_is_refused_before_torch_is_imported() -> None:
    code = textwrap.dedent(
        """
        import sys
        from qwen.errors import CheckpointNotFound
        from qwen.loading import load_model
        try:
            load_model("./missing")
        except CheckpointNotFound:
            sys.exit("torch" in sys.modules or "transformers" in sys.modules)
        """
    )
    root = Path(__file__).parent.parent
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0


def test_folder_without_weights_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointDamaged, match=r"lacks model\.safetensors"):
        load_model(str(folder))
    with pytest.raises(CheckpointNotFound, match=r"config\.json"):
        load_model(str(folder.parent))


@pytest.mark.parametrize("kept", [0, 7, 500, 100_000, -1])
def test_cut_weights_are_named(folder: Path, kept: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointDamaged, match=r"model\.safetensors is damaged"):
        load_folder(folder)


def test_weights_of_another_format_are_named(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"version https://git-lfs.example/spec/v1\n" * 4)
    with pytest.raises(CheckpointDamaged, match=r"model\.safetensors is damaged"):
        load_folder(folder)


def test_renamed_tensor_is_named(folder: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    edit_weights(folder, lambda tensors: tensors.update(other=tensors.pop(name)))
    with pytest.raises(
        CheckpointDamaged, match=r"tensor model\.layers\.1\.mlp\.up_proj\.weight is"
    ):
        load_folder(folder)


def test_missing_output_matrix_is_named(folder: Path) -> None:
    edit_weights(folder, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(CheckpointDamaged, match=r"lm_head\.weight"):
        load_folder(folder)


def test_tensor_of_another_shape_is_damage(folder: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    edit_weights(folder, lambda tensors: tensors.update({name: tensors[name][:-1].clone()}))
    with pytest.raises(CheckpointDamaged, match=r"shape|mismatch"):
        load_folder(folder)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "\x00\x01", '{"a": 1}'])
def test_damaged_config_is_named(folder: Path, content: str) -> None:
    (folder / "config.json").write_text(content)
    with pytest.raises(CheckpointDamaged, match=r"config\.json"):
        load_folder(folder)


def test_config_with_nonsense_is_damage(folder: Path) -> None:
    edit_json(folder / "config.json", num_attention_heads="many")
    with pytest.raises(CheckpointDamaged):
        load_folder(folder)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_damaged_tokenizer_is_named(folder: Path, name: str) -> None:
    content = (folder / name).read_text()
    (folder / name).write_text(content[: len(content) // 2])
    with pytest.raises(CheckpointDamaged, match="tokenizer"):
        load_folder(folder)


def test_damaged_generation_settings_are_refused(folder: Path) -> None:
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(CheckpointDamaged, match=r"generation_config\.json"):
        load_folder(folder)


# Kinds that are not run


def test_tokenizer_of_another_model_is_refused(folder: Path) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    rows = json.loads((folder / "config.json").read_text())["vocab_size"]
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary |= {f"extra{i}": len(vocabulary) + i for i in range(rows)}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(CheckpointDamaged, match="do not belong together"):
        load_folder(folder)


@pytest.mark.parametrize("method", ["awq", "bitsandbytes", "compressed-tensors"])
def test_quantised_weights_are_refused_by_name(folder: Path, method: str) -> None:
    edit_json(folder / "config.json", quantization_config={"quant_method": method, "bits": 4})
    with pytest.raises(CheckpointUnsupported, match=method):
        load_folder(folder)


def test_unknown_kind_is_refused_and_its_code_not_run(folder: Path) -> None:
    (folder / "modeling_own.py").write_text(f"open({str(folder / 'ran')!r}, 'w')")
    auto = {"AutoConfig": "modeling_own.Own", "AutoModelForCausalLM": "modeling_own.Own"}
    edit_json(folder / "config.json", model_type="never_heard_of", auto_map=auto)
    with pytest.raises(CheckpointUnsupported, match="never run"):
        load_folder(folder)
    assert not (folder / "ran").exists()


def test_known_kind_with_its_own_code_runs_ours(folder: Path) -> None:
    (folder / "modeling_own.py").write_text(f"open({str(folder / 'ran')!r}, 'w')")
    edit_json(folder / "config.json", auto_map={"AutoModelForCausalLM": "modeling_own.Own"})
    model, _ = load_folder(folder)
    assert type(model).__module__.startswith("transformers.")
    assert not (folder / "ran").exists()


def test_model_that_continues_no_text_is_refused(folder: Path) -> None:
    edit_json(folder / "config.json", model_type="clip")
    with pytest.raises(CheckpointUnsupported, match="clip"):
        load_folder(folder)


def test_adapter_is_refused(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointUnsupported, match="adapter"):
        load_folder(folder)


# Memory


def test_memory_that_runs_out_on_a_gpu_is_explained(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    def fail(*args: object, **options: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fail)
    with pytest.raises(OutOfMemory, match="smaller checkpoint") as caught:
        load_folder(folder)
    assert caught.value.__cause__ is None and caught.value.__context__ is None


#: Loads a checkpoint under an address space limit that leaves `sys.argv[3]` bytes.
LIMITED = textwrap.dedent(
    """
    import resource, sys
    from pathlib import Path
    from qwen.errors import OutOfMemory
    from qwen.loading import load_folder

    def status(name):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(name + ":"):
                return int(line.split()[1]) * 1024

    load_folder(Path(sys.argv[1]))  # imports, threads and pools exist from here on
    before = status("VmRSS")
    limit = status("VmSize") + int(sys.argv[3])
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    try:
        load_folder(Path(sys.argv[2]))
    except OutOfMemory as error:
        print(error)
    print("kept", status("VmRSS") - before)
    load_folder(Path(sys.argv[1]))
    print("still works")
    """
)


def load_under_limit(small: Path, large: Path, spare: int) -> str:
    result = subprocess.run(
        [sys.executable, "-c", LIMITED, str(small), str(large), str(spare)],
        cwd=Path(__file__).parent.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def check_limited(output: str, allowed: int) -> None:
    assert "There is not enough memory to load" in output, output
    kept = int(output.split("kept")[1].split()[0])
    assert kept < allowed
    assert "still works" in output


@pytest.mark.skipif(sys.platform != "linux", reason="needs an address space limit")
def test_memory_that_runs_out_while_loading_is_freed(original: Path, tmp_path: Path) -> None:
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    large = Path(shutil.copytree(original, tmp_path / "large"))
    config = Qwen2Config.from_pretrained(large, hidden_size=1024, vocab_size=60_000)
    config.dtype = torch.float32
    with torch.device("meta"):
        empty = Qwen2ForCausalLM(config)
    model = empty.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.zero_()
    model.save_pretrained(large)
    check_limited(load_under_limit(original, large, 150 * 10**6), 100 * 10**6)


@pytest.mark.integration
@pytest.mark.skipif(sys.platform != "linux", reason="needs an address space limit")
def test_embedded_model_that_does_not_fit_is_explained(
    original: Path, embedded_folder: Path
) -> None:
    check_limited(load_under_limit(original, embedded_folder, 600 * 10**6), 200 * 10**6)


@pytest.mark.integration
def test_embedded_model_answers(embedded_folder: Path) -> None:
    import torch

    model, tokenizer = load_folder(embedded_folder, dtype="bfloat16")
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.inference_mode():
        best = int(model(ids).logits[0, -1].argmax())
    assert tokenizer.decode([best]).strip() == "Paris"
