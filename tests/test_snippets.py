"""The reference's snippets of September 2023 run with only their import lines changed.

Each test is a snippet as its readers know it, on tiny random checkpoints that stand under the
published names in the working directory and look as the hub's do, remote code included.
"""

from __future__ import annotations

import json

import pytest
import torch
from local_hub import LocalHub
from rank_files import TINY_RANKS, TINY_VOCAB_SIZE, write_tiny_ranks
from reference_v1 import CONFIG, random_weights, reference_reply, write_checkpoint
from safetensors.torch import load_file

from qwen import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    snapshot_download,
)
from qwen.chat import decode_tokens, get_stop_words_ids, make_context

BOMB = "raise SystemExit('code of the checkpoint was run')\n"
REMOTE_CODE = (
    "configuration_qwen",
    "cpp_kernels",
    "modeling_qwen",
    "qwen_generation_utils",
    "tokenization_qwen",
)
EOD = len(TINY_RANKS)
SIZES = CONFIG | {"vocab_size": TINY_VOCAB_SIZE + 6, "seq_length": 256, "torch_dtype": "bfloat16"}
#: `verify_ranks` stands for the one thing that a tiny checkpoint cannot have: the published ranks.
TOKENIZER_CONFIG = {
    "auto_map": {"AutoTokenizer": ["tokenization_qwen.QWenTokenizer", None]},
    "clean_up_tokenization_spaces": True,
    "model_max_length": 8192,
    "tokenizer_class": "QWenTokenizer",
    "verify_ranks": False,
}
#: As published, but with the best token always drawn, so that replies can be compared.
GENERATION_CONFIG = {
    "chat_format": "chatml",
    "do_sample": True,
    "eos_token_id": EOD,
    "pad_token_id": EOD,
    "max_new_tokens": 10,
    "max_window_size": 6144,
    "repetition_penalty": 1.1,
    "top_k": 1,
    "top_p": 0.8,
    "transformers_version": "4.31.0",
}
RAW = {"chat_format": "raw", "stop_words_ids": [[EOD]], "repetition_penalty": 1.0}


@pytest.fixture(scope="module")
def weights():
    return random_weights(SIZES, seed=1)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tiny tensors are faster without a second thread, most of all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch, weights):
    """A working directory that holds the checkpoints by their published names."""
    monkeypatch.chdir(tmp_path)
    for name, generation in (("Qwen-7B-Chat", {}), ("Qwen-7B", RAW)):
        folder = write_checkpoint(tmp_path / "Qwen" / name, SIZES, weights)
        (folder / "generation_config.json").write_text(json.dumps(GENERATION_CONFIG | generation))
        (folder / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG))
        write_tiny_ranks(folder)
        for module in REMOTE_CODE:
            (folder / f"{module}.py").write_text(BOMB)
    return tmp_path


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({"device_map": "auto", "bf16": True}, torch.bfloat16),
        ({"device_map": "auto", "fp16": True}, torch.float16),
        ({"device_map": "auto"}, torch.float32),
        ({"device_map": "cpu"}, torch.float32),
        ({"device_map": "auto", "use_flash_attn": False}, torch.float32),
        (
            {
                "device_map": "auto",
                "use_cache_quantization": True,
                "use_cache_kernel": True,
                "use_flash_attn": False,
            },
            torch.float32,
        ),
    ],
)
def test_chat_in_three_turns(options, dtype, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    tokenizer = AutoTokenizer.from_pretrained("Qwen/Qwen-7B-Chat", trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(
        "Qwen/Qwen-7B-Chat", trust_remote_code=True, **options
    ).eval()
    model.generation_config = GenerationConfig.from_pretrained(
        "Qwen/Qwen-7B-Chat", trust_remote_code=True
    )

    response, history = model.chat(tokenizer, "你好", history=None)
    answers = [response]
    response, history = model.chat(
        tokenizer, "给我讲一个年轻人奋斗创业最终取得成功的故事。", history=history
    )
    answers.append(response)
    response, history = model.chat(tokenizer, "给这个故事起一个标题", history=history)

    assert model.dtype == dtype
    assert [turn[1] for turn in history] == [*answers, response]
    assert [turn[0][:2] for turn in history] == ["你好", "给我", "给这"]
    assert all(answers)


def test_chat_without_setting_a_generation_config():
    tokenizer = AutoTokenizer.from_pretrained("Qwen/Qwen-7B-Chat", trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(
        "Qwen/Qwen-7B-Chat", device_map="auto", trust_remote_code=True
    ).eval()
    response, _ = model.chat(tokenizer, "你好呀", history=None, system="请用二次元可爱语气和我说话")
    model.generation_config = GenerationConfig.from_pretrained(
        "Qwen/Qwen-7B-Chat", trust_remote_code=True
    )
    again, _ = model.chat(tokenizer, "你好呀", history=None, system="请用二次元可爱语气和我说话")
    other, _ = model.chat(tokenizer, "你好呀", history=None)
    assert response == again != other


def test_chat_stream_as_in_the_demos():
    tokenizer = AutoTokenizer.from_pretrained("Qwen/Qwen-7B-Chat", trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(
        "Qwen/Qwen-7B-Chat", device_map="cpu", trust_remote_code=True
    ).eval()
    config = GenerationConfig.from_pretrained("Qwen/Qwen-7B-Chat", trust_remote_code=True)
    history = [("你好", "你好！")]
    for response in model.chat_stream(  # noqa: B007
        tokenizer, "hello", history=history, generation_config=config
    ):
        pass
    assert response == model.chat(tokenizer, "hello", history=history)[0]


def test_chat_with_stop_words_and_sampling_as_in_the_api():
    tokenizer = AutoTokenizer.from_pretrained(
        "Qwen/Qwen-7B-Chat", trust_remote_code=True, resume_download=True
    )
    model = AutoModelForCausalLM.from_pretrained(
        "Qwen/Qwen-7B-Chat", device_map="cpu", trust_remote_code=True, resume_download=True
    ).eval()
    model.generation_config = GenerationConfig.from_pretrained(
        "Qwen/Qwen-7B-Chat", trust_remote_code=True, resume_download=True
    )
    response, _ = model.chat(tokenizer, "hello", history=[], top_p=0.5, temperature=0.3)
    _, context = make_context(tokenizer, "hello", system="You are a helpful assistant.")
    reply = model.generate(torch.tensor([context]))[0, len(context) :].tolist()
    assert response == tokenizer.decode(reply).strip()

    response, _ = model.chat(
        tokenizer, "hello", history=[], stop_words_ids=[reply[3:5]], temperature=0.3
    )
    assert response == tokenizer.decode(reply[:5]).strip()


def test_base_model_completes_text(weights):
    tokenizer = AutoTokenizer.from_pretrained("Qwen/Qwen-7B", trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(
        "Qwen/Qwen-7B", device_map="auto", trust_remote_code=True, fp32=True
    ).eval()
    text = "蒙古国的首都是乌兰巴托（Ulaanbaatar）\n埃塞俄比亚的首都是"
    inputs = tokenizer(text, return_tensors="pt")
    inputs = inputs.to(model.device)
    pred = model.generate(**inputs)
    answer = tokenizer.decode(pred.cpu()[0], skip_special_tokens=True)

    prompt = inputs.input_ids[0].tolist()
    reply = reference_reply(weights, SIZES, prompt, 10)
    assert pred[0].tolist() == prompt + reply
    assert answer == text + tokenizer.decode(reply, skip_special_tokens=True)


def test_batch_inference_with_left_padding(monkeypatch):
    monkeypatch.chdir("Qwen/Qwen-7B-Chat")
    tokenizer = AutoTokenizer.from_pretrained(
        "./",
        pad_token="<|extra_0|>",
        eos_token="<|endoftext|>",
        padding_side="left",
        trust_remote_code=True,
    )
    model = AutoModelForCausalLM.from_pretrained(
        "./", pad_token_id=tokenizer.pad_token_id, device_map="auto", trust_remote_code=True
    ).eval()
    model.generation_config = GenerationConfig.from_pretrained(
        "./", pad_token_id=tokenizer.pad_token_id
    )

    all_raw_text = ["我想听你说爱我。", "今天我想吃点啥，甜甜的，推荐下" * 6, "我马上迟到了"]
    batch_raw_text = []
    for q in all_raw_text:
        raw_text, _ = make_context(
            tokenizer,
            q,
            system="You are a helpful assistant.",
            max_window_size=model.generation_config.max_window_size,
            chat_format=model.generation_config.chat_format,
        )
        batch_raw_text.append(raw_text)

    batch_input_ids = tokenizer(batch_raw_text, padding="longest")
    batch_input_ids = torch.LongTensor(batch_input_ids["input_ids"]).to(model.device)
    batch_out_ids = model.generate(
        batch_input_ids,
        return_dict_in_generate=False,
        generation_config=model.generation_config,
    )
    padding_lens = [
        batch_input_ids[i].eq(tokenizer.pad_token_id).sum().item()
        for i in range(batch_input_ids.size(0))
    ]

    batch_response = [
        decode_tokens(
            batch_out_ids[i][padding_lens[i] :],
            tokenizer,
            raw_text_len=len(batch_raw_text[i]),
            context_length=(batch_input_ids[i].size(0) - padding_lens[i]),
            chat_format="chatml",
            verbose=False,
            errors="replace",
        )
        for i in range(len(all_raw_text))
    ]
    # The longest is past seq_length: its row has an alpha of its own.
    assert batch_input_ids.shape[1] > SIZES["seq_length"] and padding_lens[0] > 100
    solo = [model.chat(tokenizer, text, history=None)[0] for text in all_raw_text]
    assert batch_response == solo and all(solo)
    assert get_stop_words_ids("chatml", tokenizer) == [[EOD + 2], [EOD + 1]]


def test_padding_is_set_on_a_loaded_tokenizer():
    tokenizer = AutoTokenizer.from_pretrained("Qwen/Qwen-7B", trust_remote_code=True)
    tokenizer.padding_side = "left"
    tokenizer.pad_token = "<|extra_0|>"
    tokenizer.pad_token_id = tokenizer.eod_id
    inputs = tokenizer(["a", "bcd"], return_tensors="pt", padding=True)
    assert inputs.input_ids.tolist() == [[EOD, EOD, 97], [98, 99, 100]]
    assert inputs.attention_mask.tolist() == [[0, 0, 1], [1, 1, 1]]
    assert set(inputs) == {"input_ids", "attention_mask"}


def test_checkpoint_comes_from_modelscope(home, monkeypatch, weights):
    folder = home / "Qwen" / "Qwen-7B-Chat"
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    with LocalHub() as hub:
        hub.add_modelscope_repository("qwen/Qwen-7B-Chat", files)
        for name, content in files.items():
            hub.files[f"/models/qwen/Qwen-7B-Chat/resolve/v1.0.5/{name}"] = content
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", hub.url)
        monkeypatch.setenv("MODELSCOPE_CACHE", str(home / "cache"))
        model_dir = snapshot_download("modelscope:qwen/Qwen-7B-Chat", revision="v1.0.5")
    tokenizer = AutoTokenizer.from_pretrained(model_dir, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(
        model_dir, device_map="auto", trust_remote_code=True, fp32=True
    ).eval()
    assert torch.equal(model.lm_head.weight, weights["lm_head.weight"])
    assert model.chat(tokenizer, "你好", history=None)[0]


def test_sizes_are_told_under_their_published_names():
    config = AutoConfig.from_pretrained("Qwen/Qwen-7B-Chat", trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained("Qwen/Qwen-7B-Chat", trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(
        "Qwen/Qwen-7B-Chat", config=config, trust_remote_code=True
    )
    model.config.use_dynamic_ntk = model.config.use_logn_attn = True
    assert (model.config.seq_length, model.config.kv_channels) == (256, 16)
    assert tokenizer.eod_id == tokenizer.special_tokens["<|endoftext|>"] == EOD
    assert (tokenizer.im_start_id, tokenizer.im_end_id) == (EOD + 1, EOD + 2)


def test_saved_checkpoint_is_loaded_again(home, weights):
    tokenizer = AutoTokenizer.from_pretrained("Qwen/Qwen-7B-Chat", trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(
        "Qwen/Qwen-7B-Chat", device_map="auto", trust_remote_code=True, fp32=True
    )
    model.save_pretrained("mine", max_shard_size="100KB", safe_serialization=True)
    tokenizer.save_pretrained("mine")
    saved = {}
    for path in (home / "mine").glob("model-*.safetensors"):
        saved |= load_file(path)
    assert saved.keys() == weights.keys()
    assert all(torch.equal(saved[name], weights[name]) for name in weights)
    again = AutoModelForCausalLM.from_pretrained("mine", trust_remote_code=True).eval()
    loaded = AutoTokenizer.from_pretrained("mine", trust_remote_code=True)
    assert again.dtype == torch.float32
    assert again.chat(loaded, "你好") == model.chat(tokenizer, "你好")


def test_fine_tuning_script_loads_and_trains():
    config = AutoConfig.from_pretrained("Qwen/Qwen-7B", cache_dir=None, trust_remote_code=True)
    config.use_cache = False
    model = AutoModelForCausalLM.from_pretrained(
        "Qwen/Qwen-7B", config=config, cache_dir=None, device_map=None, low_cpu_mem_usage=True
    )
    tokenizer = AutoTokenizer.from_pretrained(
        "Qwen/Qwen-7B",
        cache_dir=None,
        model_max_length=512,
        padding_side="right",
        use_fast=False,
        trust_remote_code=True,
    )
    tokenizer.pad_token_id = tokenizer.eod_id
    inputs = tokenizer(["hello", "hello us"], padding=True, return_tensors="pt")
    loss = model.train()(**inputs, labels=inputs.input_ids).loss
    loss.backward()
    assert model.transformer.h[0].attn.c_attn.weight.grad.abs().max() > 0
    assert tokenizer("<|im_start|>").input_ids == [EOD + 1]


def test_checkpoint_of_august_2023_loads(home, weights):
    later = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    later += ("max_position_embeddings", "attn_dropout_prob", "emb_dropout_prob")
    names = ("n_embd", "n_layer", "n_head", "ffn_hidden_size")
    names += ("n_positions", "attn_pdrop", "embd_pdrop")
    keys = dict(SIZES)
    keys |= {name: keys.pop(key) for name, key in zip(names, later, strict=True)}
    keys |= {"n_inner": None, "resid_pdrop": 0.1, "padded_vocab_size": keys["vocab_size"]}
    keys |= {"apply_residual_connection_post_layernorm": False, "pos_emb": "rotary"}
    (home / "Qwen" / "Qwen-7B" / "config.json").write_text(json.dumps(keys))

    config = AutoConfig.from_pretrained("Qwen/Qwen-7B", trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained("Qwen/Qwen-7B", trust_remote_code=True, fp32=True)
    assert (config.n_embd, config.n_layer, config.n_head) == (32, 2, 2)
    assert (config.ffn_hidden_size, config.n_positions) == (96, 256)
    assert torch.equal(model.lm_head.weight, weights["lm_head.weight"])
    ids = [5, 6, 7]
    pred = model.generate(torch.tensor([ids]), max_new_tokens=5)
    assert pred[0].tolist() == ids + reference_reply(weights, SIZES, ids, 5)
    model.save_pretrained("mine")
    assert json.loads((home / "mine" / "config.json").read_text())["hidden_size"] == 32
