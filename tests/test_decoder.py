import golden_v1
import pytest
import torch
from tiny_model import build_tiny_model

from qwen.decoder import Decoder, Piece
from qwen.fast_decoder import build_decoder
from qwen.int8_linear import Int8Linear

MODELS = {"qwen2": build_tiny_model, "qwen1": golden_v1.load_tiny}


@pytest.fixture(params=MODELS)
def make(request):
    return MODELS[request.param]


def prompt(length, seed=0):
    return torch.randint(0, 290, (length,), generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def read(decoder, ids, *cuts):
    """Read ids in pieces that end at `cuts`; return the logits after each piece."""
    sequence = decoder.start(len(ids))
    return [decoder.read(piece, sequence) for piece in torch.tensor_split(ids, cuts)]


@torch.inference_mode()
def full(model, ids):
    return model(ids[None], use_cache=False).logits[0]


# 64 is the trained length of the golden model: past it NTK and log-n are at work.
@pytest.mark.parametrize("length", [1, 20, 64, 65, 150])
def test_decoder_equals_the_transformers_classes(make, length):
    ids = prompt(length)
    (logits,) = read(Decoder(make()), ids)
    torch.testing.assert_close(logits, full(make(), ids)[-1], atol=2e-4, rtol=1e-4)


def test_token_by_token_equals_the_transformers_classes(make):
    ids = prompt(150)
    logits = torch.stack(read(Decoder(make()), ids, *range(7, 150)))
    torch.testing.assert_close(logits, full(make(), ids)[6:], atol=2e-4, rtol=1e-4)


def test_store_grows_in_the_middle_of_a_sequence():
    ids = prompt(600)
    model = build_tiny_model(context_length=1024)
    decoder = Decoder(model)
    sequence = decoder.start(1)
    with torch.inference_mode():
        for piece in ids.split(50):
            logits = decoder.read(piece, sequence)
    assert sequence.store.capacity >= 600
    torch.testing.assert_close(logits, full(model, ids)[-1], atol=2e-4, rtol=1e-4)


def test_model_still_runs_and_holds_no_weight_twice(make):
    model, ids = make(), prompt(30)
    before = sum(p.nbytes for p in model.parameters())
    Decoder(model)
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage() for p in model.parameters()}
    assert sum(storage.nbytes() for storage in storages.values()) == before
    torch.testing.assert_close(full(model, ids), full(make(), ids), atol=2e-4, rtol=1e-4)


def test_int8_of_a_chunk_is_that_of_its_tokens_one_by_one_bit_for_bit(make, kernels):
    ids, decoder = prompt(150), Decoder(make(), kernels=kernels)
    (whole,) = read(decoder, ids)
    pieces = read(decoder, ids, 3, 17, 18, 64, 66, 149)
    one_by_one = read(decoder, ids, *range(1, 150))
    assert torch.equal(whole, pieces[-1])
    assert torch.equal(whole, one_by_one[-1])
    assert torch.equal(pieces[2], one_by_one[17])


def test_int8_decoder_equals_the_model_with_int8_layers(make, kernels):
    # Transformers' forward on the same int8 layers: only the order of float32 sums differs, and
    # what that moves across a rounding of an activation.
    model, ids = make(), prompt(100)
    decoder = Decoder(model, kernels=kernels)
    assert isinstance(model.get_submodule("lm_head"), Int8Linear)
    (logits,) = read(decoder, ids)
    expected = full(model, ids)[-1]
    assert (logits - expected).norm() < 0.08 * expected.norm()


def test_int8_leaves_no_dense_linear_weight_behind(make, kernels):
    model = make()
    Decoder(model, kernels=kernels)
    assert not [m for m in model.modules() if type(m) is torch.nn.Linear]


def test_embedding_that_is_also_the_output_matrix_outlives_packing(kernels, monkeypatch):
    dropped = []
    monkeypatch.setattr("qwen.decoder_weights.drop_pages", dropped.append)
    model = build_tiny_model()
    model.lm_head.weight = model.model.embed_tokens.weight
    Decoder(model, kernels=kernels)
    places = [weight.data_ptr() for weight in dropped]
    assert len(places) == 2 * 7 and model.model.embed_tokens.weight.data_ptr() not in places


def test_numbers_that_are_none_reach_the_logits(kernels):
    model = build_tiny_model()
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight[3] = float("nan")
    (logits,) = read(Decoder(model, kernels=kernels), prompt(5))
    assert logits.isnan().any()


def test_model_of_another_type_is_left_to_transformers_and_named(caplog):
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=64))
    assert build_decoder(model) is None
    assert "gpt2" in caplog.text


def test_model_with_weights_on_disk_is_left_to_transformers(caplog):
    model = build_tiny_model()
    model.model.layers[1].to("meta")
    assert build_decoder(model) is None
    assert "meta" in caplog.text


def test_sliding_window_is_left_to_transformers(caplog):
    model = build_tiny_model()
    model.config.layer_types = ["full_attention", "sliding_attention"]
    assert build_decoder(model) is None
    assert "sliding_attention" in caplog.text


def test_without_a_compiler_weights_stay_dense_and_the_log_says_so(monkeypatch, tmp_path, caplog):
    monkeypatch.setattr("shutil.which", lambda name: None)
    decoder = build_decoder(build_tiny_model(), kernels_folder=tmp_path)
    assert decoder is not None and not decoder.is_exact
    assert "compiler" in caplog.text and "float32" in caplog.text


@torch.inference_mode()
def test_int8_layers_in_one_call_are_the_operations_one_by_one_bit_for_bit(
    make, kernels, monkeypatch
):
    together = Decoder(make(), kernels=kernels)
    monkeypatch.setattr("qwen.decoder.is_int8", lambda weights: False)
    by_operation = Decoder(make(), kernels=kernels)

    def logits(decoder):
        sequences = [decoder.start(length) for length in (3, 70, 20)]
        chunks = [prompt(3), prompt(70, seed=1), prompt(20, seed=2)]
        first = decoder.read_many(
            [Piece(own.tolist(), s) for own, s in zip(chunks, sequences, strict=True)]
        )
        again = [decoder.read(torch.tensor([7]), sequence) for sequence in sequences]
        return torch.stack([*first, *again])

    assert torch.equal(logits(together), logits(by_operation))
