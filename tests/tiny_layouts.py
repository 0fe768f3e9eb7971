"""Tiny checkpoints of the Qwen v1 and the Qwen2 layout, complete with tokenizers, to convert."""

from __future__ import annotations

import json
import shutil

import torch
from golden_v1 import CHECKPOINT
from rank_files import MERGES, TINY_RANKS
from safetensors.torch import load_file, save_file
from tiny_model import CHATML_TEMPLATE, build_byte_tokenizer
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen2Config
from transformers import Qwen2ForCausalLM as PlainQwen2
from transformers.convert_slow_tokenizer import bytes_to_unicode

from qwen import AutoModelForCausalLM
from qwen.convert import convert_checkpoint
from qwen.tokenization_qwen import dump_ranks

CONTEXT = 128
#: Without "Human", to which no merges lead: a rank file may have such a token, merges cannot.
RANKS = {token: rank for token, rank in TINY_RANKS.items() if token != b"Human"}
ENDOFTEXT, IM_START, IM_END = range(len(RANKS), len(RANKS) + 3)
GENERATION = {"do_sample": True, "top_p": 0.7, "eos_token_id": ENDOFTEXT, "chat_format": "chatml"}


def write_qwen1(folder):
    """Write the golden checkpoint with a tiny tokenizer; its trained length is 64 tokens."""
    shutil.copytree(CHECKPOINT, folder)
    (folder / "qwen.tiktoken").write_bytes(dump_ranks(RANKS))
    write_json(
        folder / "tokenizer_config.json", tokenizer_class="QWenTokenizer", verify_ranks=False
    )
    write_json(folder / "generation_config.json", **GENERATION)
    return folder


def write_qwen2(folder, **options):
    """Write a random Qwen2 of 4 heads that share 2 of keys and values."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 480}
    sizes |= {"max_position_embeddings": CONTEXT, "rope_parameters": {"rope_theta": 5e5}}
    config = Qwen2Config(**sizes | {"tie_word_embeddings": False, "rms_norm_eps": 2e-6} | options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = PlainQwen2(config)
        for parameter in model.parameters():  # biases and norms too, which begin as 0 and 1
            torch.nn.init.normal_(parameter, std=0.3)
    model.generation_config = GenerationConfig(do_sample=True, top_p=0.6, eos_token_id=IM_END)
    model.save_pretrained(folder)
    build_fast_tokenizer().save_pretrained(folder)
    return folder


def build_fast_tokenizer():
    """The tiny ranks as a fast tokenizer, made without the converter."""
    spelling = bytes_to_unicode()
    tokenizer = build_byte_tokenizer(CHATML_TEMPLATE)
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    spelled = {"".join(spelling[b] for b in token): rank for token, rank in RANKS.items()}
    pairs = [(token[:cut], token[cut:]) for token in MERGES for cut in range(1, len(token))]
    known = [pair for pair in pairs if set(pair) <= set(RANKS) and b"".join(pair) in RANKS]
    merges = [["".join(spelling[b] for b in part) for part in pair] for pair in known]
    backend["model"] |= {"vocab": spelled, "merges": merges}
    added = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>"]
    template = backend["added_tokens"][0]
    backend["added_tokens"] = [
        template | {"id": len(RANKS) + i, "content": text} for i, text in enumerate(added)
    ]
    made = PreTrainedTokenizerFast(
        tokenizer_object=type(tokenizer.backend_tokenizer).from_str(json.dumps(backend)),
        eos_token="<|im_end|>",
    )
    made.chat_template = CHATML_TEMPLATE
    return made


def write_json(path, **changes):
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(known | changes))


def change_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def to_qwen2(source, name="as_qwen2", **options):
    convert_checkpoint(source, source.with_name(name), to="qwen2", **options)
    return source.with_name(name)


def to_qwen1(source, name="as_qwen1", **options):
    options = {"allow_other_ranks": True} | options
    convert_checkpoint(source, source.with_name(name), to="qwen1", **options)
    return source.with_name(name)


def load_qwen1(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def load_qwen2(folder):
    return PlainQwen2.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def logits(model, ids):
    return model(ids).logits


def random_ids(length, rows=1):
    return torch.randint(0, 480, (rows, length), generator=torch.Generator().manual_seed(length))


def weights_of(folder):
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return load_file(folder / "model.safetensors")
    weights = {}
    for file in set(json.loads(index.read_text())["weight_map"].values()):
        weights |= load_file(folder / file)
    return weights


def assert_identical(actual, expected):
    assert set(actual) == set(expected)
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert torch.equal(actual[name], tensor), name


def template_ids(tokenizer, chat):
    messages = [{"role": role, "content": content} for role, content in chat]
    encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    return encoded["input_ids"]
