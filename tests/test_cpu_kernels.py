import stat

import pytest
import torch

from qwen import cpu_kernels
from qwen.cpu_kernels import KernelsUnavailable, load_kernels
from qwen.int8_linear import Int8Linear


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def quantized(kernels, weight):
    return kernels.unpack(*kernels.pack(weight), shape=tuple(weight.shape))


def quantized_activations(x, group):
    """Each token's values rounded to the grid that it is multiplied on."""
    padded = torch.nn.functional.pad(x, (0, -x.shape[1] % group)).view(len(x), -1, group)
    steps = padded.abs().amax(-1, keepdim=True) / 127
    return ((padded / steps).round() * steps).flatten(1)[:, : x.shape[1]]


@pytest.mark.parametrize("columns", [8, 32, 88, 896])
def test_packed_weights_are_within_half_a_step(kernels, columns):
    weight = random(19, columns)
    groups = torch.nn.functional.pad(weight, (0, -columns % 32)).view(19, -1, 32)
    # A scale is stored in bfloat16, which is up to 1/128 above the one that is wanted.
    steps = (groups.abs().amax(-1) / 32 * (1 + 2**-7)).repeat_interleave(32, 1)[:, :columns]
    assert kernels.group_size == 32
    wrong = (quantized(kernels, weight) - weight).abs()
    # One side of 0 has 31 steps, the other 32: who would need the last one is a step away at most.
    assert (
        wrong <= torch.where(weight.abs() > 31 * steps / (1 + 2**-7), 1.0, 0.5001) * steps
    ).all()


def test_weights_of_five_bits_in_like_groups_keep_their_values(kernels):
    codes = torch.randint(-16, 16, (40, 96), generator=torch.Generator().manual_seed(3))
    codes[:, ::32] = -16
    weight = codes * (2.0 ** torch.randint(-9, 2, (40, 3)).repeat_interleave(32, 1))
    assert torch.equal(quantized(kernels, weight), weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_packed_as_their_float32_values(kernels, dtype):
    weight = random(5, 70).to(dtype)
    for half, whole in zip(kernels.pack(weight), kernels.pack(weight.float()), strict=True):
        assert torch.equal(half, whole)


@pytest.mark.parametrize(("rows", "columns"), [(1, 8), (37, 88), (130, 896), (64, 4864)])
@pytest.mark.parametrize("tokens", [1, 2, 5, 67])
def test_product_is_that_of_quantised_weights_and_quantised_activations(
    kernels, rows, columns, tokens
):
    weight, x, bias = random(rows, columns), random(tokens, columns, seed=1), random(rows, seed=2)
    x[:, 3] *= 50  # one large activation, as real models have them
    exact = quantized_activations(x, kernels.group_size) @ quantized(kernels, weight).T + bias
    product = kernels.linear(x, *kernels.pack(weight), rows, bias)
    torch.testing.assert_close(product, exact, atol=1e-3, rtol=1e-4)


def test_result_does_not_depend_on_the_number_of_threads(kernels):
    packed, scales = kernels.pack(random(100, 96))
    x, threads = random(9, 96, seed=1), torch.get_num_threads()
    results = []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            results.append(kernels.linear(x, packed, scales, 100))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_result_is_added_in_place_where_asked(kernels):
    packed, scales = kernels.pack(random(10, 32))
    x, out = random(3, 32), random(3, 10, seed=4)
    expected = out + kernels.linear(x, packed, scales, 10)
    assert kernels.linear(x, packed, scales, 10, out=out) is out
    torch.testing.assert_close(out, expected)


def test_zero_weights_and_activations_give_zero(kernels):
    packed, scales = kernels.pack(torch.zeros(4, 40))
    assert kernels.linear(torch.zeros(2, 40), packed, scales, 4).eq(0).all()


def test_norm_and_gate_equal_torch(kernels):
    from qwen.decoder_ops import CpuOps, TorchOps

    for size in (6, 88, 896):
        x, weight = random(7, size) * 3, random(size, seed=1)
        torch.testing.assert_close(
            kernels.rms_norm(x, weight, 1e-6), TorchOps().rms_norm(x, weight, 1e-6)
        )
        both = random(7, 2 * size) * 20
        ops, torch_ops = CpuOps(kernels), TorchOps()
        torch.testing.assert_close(
            ops.gated(torch.clone, both),
            torch_ops.gated(torch.clone, both),
            atol=1e-5,
            rtol=1e-5,
        )


@pytest.mark.parametrize("sizes", [(5, 12), (16, 32), (30, 2, 40)])
def test_joined_layers_are_the_layers_one_after_another(kernels, sizes):
    layers = [torch.nn.Linear(48, out) for out in sizes]
    alone = [Int8Linear.from_linears([layer], kernels=kernels) for layer in layers]
    joined, x = Int8Linear.from_linears(layers, kernels=kernels), random(2, 3, 48)
    assert torch.equal(joined(x), torch.cat([layer(x) for layer in alone], -1))
    start = 0
    for size, layer in zip(sizes, alone, strict=True):
        rows = joined.rows(start, start + size)
        assert torch.equal(rows(x), layer(x))
        shared = joined.packed.untyped_storage().data_ptr()
        assert rows.layer.packed.untyped_storage().data_ptr() == shared
        start += size


def test_compiled_kernels_are_kept(kernels, tmp_path, monkeypatch):
    load_kernels(tmp_path)
    monkeypatch.setattr(cpu_kernels, "_compile", lambda *_: pytest.fail("compiled again"))
    load_kernels(tmp_path)


def test_compiler_that_fails_is_named_and_leaves_nothing(tmp_path, monkeypatch):
    sources = tmp_path / "broken"
    sources.mkdir()
    (sources / "kernels.cpp").write_text("this is no program")
    monkeypatch.setattr(cpu_kernels, "SOURCES", sources)
    folder = tmp_path / "kept"
    with pytest.raises(KernelsUnavailable, match="failed"):
        load_kernels(folder)
    assert not list(folder.iterdir())


def test_no_compiler_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(KernelsUnavailable, match="compiler"):
        load_kernels(tmp_path)


def test_compiler_that_hangs_is_given_up(tmp_path, monkeypatch):
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\nsleep 20\n")
    compiler.chmod(compiler.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr("shutil.which", lambda name: str(compiler))
    monkeypatch.setattr(cpu_kernels, "_TIME_LIMIT", 0.1)
    with pytest.raises(KernelsUnavailable, match="failed"):
        load_kernels(tmp_path / "kept")


def test_kernels_that_compute_wrongly_are_refused(kernels, monkeypatch):
    right = kernels.linear
    monkeypatch.setattr(kernels, "linear", lambda *args, **kw: right(*args, **kw) * 1.1)
    with pytest.raises(KernelsUnavailable, match="wrongly"):
        kernels.check()


def test_damaged_library_is_named(kernels, tmp_path, monkeypatch):
    def write_nonsense(compiler, library):
        library.write_bytes(b"no library")

    monkeypatch.setattr(cpu_kernels, "_compile", write_nonsense)
    with pytest.raises(KernelsUnavailable, match="failed"):
        load_kernels(tmp_path)


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(14, 2, 64), (3, 3, 128), (8, 2, 8)])
@pytest.mark.parametrize(("start", "tokens"), [(0, 1), (0, 21), (37, 6), (300, 40)])
def test_attention_is_that_of_torch(kernels, heads, kv_heads, dim, start, tokens):
    total, width = start + tokens, (heads + 2 * kv_heads) * dim
    qkv, capacity = random(total, width, seed=5), 400
    keys = torch.full((kv_heads, capacity, kernels.position_room(dim)), -1, dtype=torch.int16)
    values, cos, sin = keys.clone(), torch.ones(total, dim), torch.zeros(total, dim)

    def attend(begin, end):
        return kernels.attend(
            qkv[begin:end].clone(), keys, values, start=begin,
            cos=cos[begin:end], sin=sin[begin:end], logn=None, scale=dim**-0.5,
        )  # fmt: skip

    if start:
        attend(0, start)
    mixed = attend(start, total)
    parts = qkv.view(total, -1, dim).transpose(0, 1).split([heads, kv_heads, kv_heads])
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(part[None] for part in parts), is_causal=True, enable_gqa=True
    )[0].transpose(0, 1)[start:]
    # Everything is rounded to whole numbers of which the largest is 4,095 or more.
    torch.testing.assert_close(mixed.view(tokens, heads, dim), expected, atol=2e-3, rtol=0)
