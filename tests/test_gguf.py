"""GGUF → Transformers folder: once, whole or not at all, with what GGUF does not carry."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from tiny_checkpoint import CONTEXT, TEMPLATE, write_tiny_gguf

import qwen.checkpoint
import qwen.gguf
from qwen.errors import CheckpointDamaged, CheckpointUnsupported, DiskFull, OutOfMemory
from qwen.gguf import GgufFile, convert_gguf, converted_folder, local_gguf


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture(scope="module")
def converted(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert_gguf(local_gguf(tiny), dtype="float32", cache=tmp_path_factory.mktemp("cache"))


def load(folder: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    return model, AutoTokenizer.from_pretrained(folder, local_files_only=True)


def leftovers(cache: Path) -> set[str]:
    folder = cache / "converted"
    return {path.suffix for path in folder.iterdir()} if folder.exists() else set()


def test_weights_survive_with_their_untied_output_matrix(tiny: Path, converted: Path) -> None:
    import gguf
    import torch

    model, _ = load(converted)
    tensors = {tensor.name: torch.tensor(tensor.data) for tensor in gguf.GGUFReader(tiny).tensors}
    assert model.config.tie_word_embeddings is False
    assert torch.equal(model.lm_head.weight, tensors["output.weight"])
    assert torch.equal(model.model.embed_tokens.weight, tensors["token_embd.weight"])
    down = model.model.layers[1].mlp.down_proj.weight
    assert torch.equal(down, tensors["blk.1.ffn_down.weight"])


def test_tied_output_matrix_stays_tied(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "tied.gguf", tied=True)
    model, _ = load(convert_gguf(local_gguf(path), dtype="float32", cache=tmp_path))
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_tokenizer_survives(converted: Path) -> None:
    model, tokenizer = load(converted)
    assert tokenizer.chat_template == TEMPLATE
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.model_max_length == model.config.max_position_embeddings == CONTEXT
    assert tokenizer("ab<|im_end|>").input_ids == [256, 259]
    assert tokenizer("ab<|im_end|>", split_special_tokens=True).input_ids[0] == 256
    assert 259 not in tokenizer("<|im_end|>", split_special_tokens=True).input_ids
    written = json.loads((converted / "tokenizer.json").read_text())
    assert written["normalizer"] == {"type": "NFC"}


@pytest.mark.parametrize(("split", "tokens"), [("smollm", ["1", "2"]), ("gpt-2", ["12"])])
def test_smollm_tokenizer_takes_digits_one_by_one(
    tmp_path: Path, split: str, tokens: list[str]
) -> None:
    path = tmp_path / "tiny.gguf"
    write_tiny_gguf(path, architecture="llama", split=split, merge="1 2")
    _, tokenizer = load(convert_gguf(local_gguf(path), dtype="float32", cache=tmp_path))
    assert tokenizer.tokenize("12") == tokens


def test_end_tokens_are_those_of_a_chat(converted: Path) -> None:
    settings = json.loads((converted / "generation_config.json").read_text())
    assert settings["eos_token_id"] == [259, 257]


def test_given_generation_settings_are_written(tiny: Path, tmp_path: Path) -> None:
    given = {"do_sample": True, "temperature": 0.7, "top_k": 20, "eos_token_id": [259, 257]}
    file = GgufFile(path=tiny, key="k", name="A model", generation=given)
    folder = convert_gguf(file, dtype="float32", cache=tmp_path)
    settings = json.loads((folder / "generation_config.json").read_text())
    assert given.items() <= settings.items()
    assert json.loads((folder / "config.json").read_text())["_model_name_or_path"] == "A model"


def test_dtype_decides_what_is_stored_and_where(
    tiny: Path, converted: Path, tmp_path: Path
) -> None:
    folder = convert_gguf(local_gguf(tiny), dtype="bfloat16", cache=tmp_path)
    assert folder.name != converted.name
    sizes = [(path / "model.safetensors").stat().st_size for path in (folder, converted)]
    assert sizes[0] < 0.6 * sizes[1]


def test_second_conversion_opens_no_gguf_file(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = shutil.copy2(tiny, tmp_path / "mine.gguf")
    file = local_gguf(Path(path))
    first = convert_gguf(file, dtype="float32", cache=tmp_path)
    Path(path).unlink()
    assert convert_gguf(file, dtype="float32", cache=tmp_path) == first


def test_damaged_conversion_is_thrown_away_and_made_anew(tiny: Path, tmp_path: Path) -> None:
    file = local_gguf(tiny)
    weights = convert_gguf(file, dtype="float32", cache=tmp_path) / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    assert convert_gguf(file, dtype="float32", cache=tmp_path) == weights.parent
    assert weights.read_bytes() == whole


def test_changed_file_is_converted_anew(tiny: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy2(tiny, tmp_path / "mine.gguf"))
    before = local_gguf(path)
    os.utime(path, ns=(1, 1))
    after = local_gguf(path)
    folders = {converted_folder(file, dtype="float32", cache=tmp_path) for file in (before, after)}
    assert len(folders) == 2


@pytest.mark.parametrize("kept", [0, 3, 30, 200, 5000, -1])
def test_cut_file_is_damaged(tiny: Path, tmp_path: Path, kept: int) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(tiny.read_bytes()[:kept])
    with pytest.raises(CheckpointDamaged, match=r"cut\.gguf is damaged"):
        convert_gguf(local_gguf(path), dtype="float32", cache=tmp_path)
    assert leftovers(tmp_path) <= {".lock"}


def test_cut_in_the_weights_tells_the_sizes(tiny: Path, tmp_path: Path) -> None:
    size = tiny.stat().st_size
    path = tmp_path / "cut.gguf"
    path.write_bytes(tiny.read_bytes()[: size // 2])
    with pytest.raises(CheckpointDamaged, match=rf"should have {size} bytes and has {size // 2}"):
        convert_gguf(local_gguf(path), dtype="float32", cache=tmp_path)


def test_other_file_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "text.gguf"
    path.write_text("no model at all " * 100)
    with pytest.raises(CheckpointDamaged, match="beginning"):
        convert_gguf(local_gguf(path), dtype="float32", cache=tmp_path)


def test_unknown_architecture_is_unsupported(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "odd.gguf", architecture="plamo")
    with pytest.raises(CheckpointUnsupported, match=r"odd\.gguf cannot be read.*plamo"):
        convert_gguf(local_gguf(path), dtype="float32", cache=tmp_path)


def test_missing_tensor_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gguf

    real = gguf.GGUFWriter.add_tensor

    def add(self: Any, name: str, *rest: Any) -> None:
        real(self, name.replace("blk.0.ffn_up.weight", "blk.0.renamed.weight"), *rest)

    monkeypatch.setattr(gguf.GGUFWriter, "add_tensor", add)
    path = write_tiny_gguf(tmp_path / "renamed.gguf")
    with pytest.raises(CheckpointDamaged, match=r"model\.layers\.0\.mlp\.up_proj\.weight"):
        convert_gguf(local_gguf(path), dtype="float32", cache=tmp_path)


def test_full_disk_is_refused_up_front(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=32 * 10**6)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(DiskFull, match="QWEN_CACHE"):
        convert_gguf(local_gguf(tiny), dtype="float32", cache=tmp_path)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), DiskFull),
        (RuntimeError("I/O error: No space left on device (os error 28)"), DiskFull),
        (MemoryError(), OutOfMemory),
        (ValueError("odd"), CheckpointDamaged),
    ],
)
def test_fault_while_writing_leaves_nothing_behind(
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    expected: type[Exception],
) -> None:
    from transformers import Qwen2ForCausalLM

    def save(self: object, folder: Path) -> None:
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half")
        raise error

    monkeypatch.setattr(Qwen2ForCausalLM, "save_pretrained", save)
    with pytest.raises(expected):
        convert_gguf(local_gguf(tiny), dtype="float32", cache=tmp_path)
    assert leftovers(tmp_path) == {".lock"}


def test_half_written_folder_of_a_killed_process_is_replaced(tiny: Path, tmp_path: Path) -> None:
    folder = converted_folder(local_gguf(tiny), dtype="float32", cache=tmp_path)
    half = folder.with_name(folder.name + ".part")
    half.mkdir(parents=True)
    (half / "stale").write_text("")
    assert not (convert_gguf(local_gguf(tiny), dtype="float32", cache=tmp_path) / "stale").exists()
    assert not half.exists()


@pytest.mark.parametrize("moment", ["within_weights", "after_weights"])
def test_process_killed_while_it_writes_leaves_nothing_corrupt(
    tiny: Path, tmp_path: Path, moment: str
) -> None:
    code = textwrap.dedent(
        """
        import os, signal, sys
        from pathlib import Path
        from transformers import Qwen2ForCausalLM
        from qwen.gguf import convert_gguf, local_gguf
        save = Qwen2ForCausalLM.save_pretrained
        def save_and_die(model, folder):
            if sys.argv[3] == "after_weights":
                save(model, folder)
            else:
                Path(folder).mkdir()
                (Path(folder) / "model.safetensors").write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        Qwen2ForCausalLM.save_pretrained = save_and_die
        convert_gguf(local_gguf(Path(sys.argv[1])), dtype="float32", cache=Path(sys.argv[2]))
        """
    )
    command = [sys.executable, "-c", code, str(tiny), str(tmp_path), moment]
    killed = subprocess.run(command, cwd=Path(__file__).parent.parent, timeout=120)
    assert killed.returncode == -signal.SIGKILL
    assert not converted_folder(local_gguf(tiny), dtype="float32", cache=tmp_path).exists()
    folder = convert_gguf(local_gguf(tiny), dtype="float32", cache=tmp_path)
    assert qwen.gguf.is_whole(folder)
    assert not folder.with_name(folder.name + ".part").exists()


def test_two_processes_at_once_convert_once(tiny: Path, tmp_path: Path) -> None:
    code = textwrap.dedent(
        """
        import sys
        from pathlib import Path
        from qwen.gguf import convert_gguf, local_gguf
        report = lambda step, **_: print(step, flush=True)
        convert_gguf(local_gguf(Path(sys.argv[1])), dtype="float32", cache=Path(sys.argv[2]),
                     report=report)
        """
    )
    command = [sys.executable, "-c", code, str(tiny), str(tmp_path)]
    root = Path(__file__).parent.parent
    children = [
        subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    outputs = [child.communicate(timeout=120)[0] for child in children]
    assert [child.returncode for child in children] == [0, 0]
    assert sum("Unpacking the weights" in output for output in outputs) == 1


# The embedded model


@pytest.mark.integration
def test_embedded_model_keeps_its_own_output_matrix(embedded_folder: Path) -> None:
    import torch
    from safetensors import safe_open

    config = json.loads((embedded_folder / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    assert config["max_position_embeddings"] == 32768
    with safe_open(embedded_folder / "model.safetensors", "pt") as weights:
        head = weights.get_slice("lm_head.weight")[:1000]
        embedding = weights.get_slice("model.embed_tokens.weight")[:1000]
    assert not torch.equal(head, embedding)
    assert (head - embedding).abs().max() < 0.05  # the same matrix, stored at two precisions


@pytest.mark.integration
def test_embedded_model_has_the_official_generation_settings(embedded_folder: Path) -> None:
    settings = json.loads((embedded_folder / "generation_config.json").read_text())
    expected = {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.1}
    assert expected.items() <= settings.items()
    assert settings["eos_token_id"] == [151645, 151643]


#: Ids of the official Qwen tokenizer; the ranks of v1 and Qwen2 are the same.
OFFICIAL_IDS = {
    "Hello, world!": [9707, 11, 1879, 0],
    "The quick brown fox jumps over the lazy dog.": [
        *(785, 3974, 13876, 38835, 34208, 916, 279, 15678, 5562, 13),
    ],
    "system\n": [8948, 198],
    "e\u0301": [963],  # NFC joins letter and accent
    "\u00e9": [963],
    "<|im_start|>user<|im_end|><|endoftext|>": [151644, 872, 151645, 151643],
}


@pytest.mark.integration
def test_embedded_tokenizer_is_the_official_one(embedded_folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(embedded_folder, local_files_only=True)
    assert {text: tokenizer(text).input_ids for text in OFFICIAL_IDS} == OFFICIAL_IDS
    assert tokenizer.eos_token_id == 151645
    assert max(tokenizer("<|im_end|>", split_special_tokens=True).input_ids) < 151643
    prompt = tokenizer.apply_chat_template(
        [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}],
        tokenize=False,
        add_generation_prompt=True,
    )
    assert prompt == (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.integration
def test_embedded_model_is_unpacked_only_once(
    embedded_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qwen.checkpoint import resolve_checkpoint

    def refuse(*args: object, **options: object) -> None:
        raise AssertionError("fetched or unpacked again")

    monkeypatch.setattr(qwen.checkpoint, "fetch_data_file", refuse)
    monkeypatch.setattr(qwen.gguf, "_convert", refuse)
    assert resolve_checkpoint("auto").folder == embedded_folder
