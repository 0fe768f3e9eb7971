"""`Int4Linear` against the dense weights that it stands for."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_gptq import round_weight

from qwen import int4_kernels, quantized
from qwen.errors import CheckpointUnsupported
from qwen.gptq_format import GptqConfig, dequantize
from qwen.quantized import DENSE_ROWS_CPU, DENSE_ROWS_GPU, Int4Linear

#: bfloat16 has 8 significant bits: what it rounds is off by 1/256 at most.
ROUNDING = 2**-8


def build(inputs, outputs, *, group_size=128, sym=True, bias=True, device="cpu"):
    """Return a layer, its exact dense weight (out, in) and its bias."""
    generator = torch.Generator().manual_seed(inputs + outputs)
    weight = torch.randn(outputs, inputs, generator=generator)
    config = GptqConfig(group_size=group_size, sym=sym)
    offsets = torch.randn(outputs, generator=generator).half()
    tensors = round_weight(weight, config, bias=offsets if bias else None)
    exact = dequantize(tensors, config).to(device)
    moved = type(tensors)(
        **{
            part: getattr(tensors, part).to(device)
            for part in ("qweight", "qzeros", "scales", "g_idx")
        },
        bias=tensors.bias.to(device) if bias else None,
    )
    layer = Int4Linear.from_gptq(moved, config, dtype=torch.float32)
    return layer, exact, moved.bias.float() if bias else torch.zeros(outputs, device=device)


def random_rows(*shape, device="cpu"):
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).to(device)


def assert_close(actual, inputs, weight, bias):
    """Compare with dense float32: scales and inputs are rounded to bfloat16, and the result."""
    inputs = inputs.float()
    bound = 4 * ROUNDING * (inputs.abs() @ weight.abs().t() + bias.abs())
    expected = inputs @ weight.t() + bias
    assert (actual.float() - expected).abs().le(bound).all()
    error = (actual.float() - expected).pow(2).mean().sqrt()
    assert error < ROUNDING * expected.pow(2).mean().sqrt()


SIZES = [(128, 64, 128), (896, 128, 128), (96, 48, 128), (256, 80, 64), (64, 16, 32), (192, 32, -1)]


@pytest.mark.parametrize(("inputs", "outputs", "group_size"), SIZES)
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("rows", [1, 3, DENSE_ROWS_CPU, DENSE_ROWS_CPU + 1])
def test_layer_computes_what_the_dense_weight_would(inputs, outputs, group_size, sym, rows):
    layer, weight, bias = build(inputs, outputs, group_size=group_size, sym=sym)
    rows = random_rows(rows, inputs)
    assert_close(layer(rows), rows, weight, bias)


@pytest.mark.parametrize(("inputs", "outputs", "group_size"), SIZES)
@pytest.mark.parametrize("sym", [True, False])
def test_dequantized_weight_is_that_of_the_checkpoint(inputs, outputs, group_size, sym):
    layer, weight, _ = build(inputs, outputs, group_size=group_size, sym=sym)
    close = layer.dequantized_weight() - weight
    # (8 - zero) * scale is rounded by itself: the error is that of the largest weight.
    assert close.abs().max() <= ROUNDING * weight.abs().max()
    assert layer.dequantized_weight(torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(), (1,), (2, 3), (1, 2, 80), (0,), (2, 0)])
def test_any_leading_shape_and_dtype_is_kept(dtype, shape):
    layer, *_ = build(64, 32, group_size=32)
    layer = layer.to(dtype)
    outputs = layer(random_rows(*shape, 64).to(dtype))
    assert outputs.shape == (*shape, 32)
    assert outputs.dtype == dtype


def test_rows_that_are_no_whole_tensor_are_read_right():
    layer, weight, bias = build(64, 32, group_size=32)
    rows = random_rows(64, 6).t()
    assert_close(layer(rows), rows, weight, bias)
    wide = random_rows(3, 128)[:, ::2]
    assert_close(layer(wide), wide, weight, bias)


def test_both_forms_agree(monkeypatch):
    layer, *_ = build(256, 1040, group_size=128)  # more outputs than are unpacked at a time
    rows = random_rows(40, 256)
    few = layer(rows)
    monkeypatch.setattr(quantized, "DENSE_ROWS_CPU", 0)
    many = layer(rows)
    assert not torch.equal(few, many)  # two forms indeed
    assert (few - many).norm() < ROUNDING * many.norm()


def test_layer_keeps_no_dense_copy():
    layer, weight, _ = build(1024, 512)
    layer(random_rows(DENSE_ROWS_CPU + 1, 1024))
    tensors = [*layer.buffers(), *layer.parameters()]
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    assert size < weight.numel() * 0.55


def test_gradients_of_inputs_are_those_of_the_dense_weight():
    layer, weight, _ = build(64, 32, group_size=32)
    rows = random_rows(2, 64).requires_grad_()
    layer(rows).sum().backward()
    assert (rows.grad - weight.sum(0)).norm() < ROUNDING * weight.sum(0).norm()


def test_change_of_dtype_leaves_the_packed_weight_alone():
    layer, *_ = build(64, 32, group_size=32)
    before = layer.dequantized_weight()
    changed = copy.deepcopy(layer).half().double().to(torch.float32)
    assert torch.equal(changed.dequantized_weight(), before)
    assert torch.equal(copy.deepcopy(layer).dequantized_weight(), before)


def test_state_dict_holds_nothing_that_another_cpu_would_misread():
    layer, *_ = build(64, 32, group_size=32)
    assert set(layer.state_dict()) == {"bias"}


def test_move_to_a_device_without_kernels_is_refused():
    layer, *_ = build(64, 32, group_size=32)
    before = layer.dequantized_weight()
    with pytest.raises(CheckpointUnsupported, match="meta"):
        layer.to("meta")
    assert torch.equal(layer.dequantized_weight(), before)


@pytest.mark.parametrize(
    ("inputs", "outputs", "group_size", "expected"),
    [
        (4096, 12288, 128, 128),
        (11008, 4096, 128, 128),
        (96, 48, 128, 32),
        (96, 48, 64, 32),
        (192, 48, -1, 64),
        (128, 40, 128, None),  # outputs
        (80, 48, 32, None),  # inputs
        (80, 48, -1, None),
    ],
)
def test_sizes_that_kernels_take(inputs, outputs, group_size, expected):
    sizes = {"out_features": outputs, "in_features": inputs, "group_size": group_size}
    assert int4_kernels.kernel_group(**sizes) == expected
    assert Int4Linear.fits(**sizes) == (expected is not None)


def test_sizes_that_no_kernel_takes_are_refused():
    codes = torch.zeros(80, 48, dtype=torch.uint8)
    zeros = torch.full((3, 48), 8, dtype=torch.uint8)
    with pytest.raises(CheckpointUnsupported, match="80 inputs and 48 outputs"):
        Int4Linear(codes, torch.ones(3, 48), zeros, group_size=32)


def test_unknown_packed_form_is_never_unpacked(monkeypatch):
    layer, weight, bias = build(64, 32, group_size=32)
    monkeypatch.setattr(int4_kernels, "_cpu_block", lambda: None)
    rows = random_rows(DENSE_ROWS_CPU + 1, 64)
    assert_close(layer(rows), rows, weight, bias)
    assert (layer.dequantized_weight() - weight).abs().max() < 2 * ROUNDING * weight.abs().max()


# On a GPU: python -m pytest tests/test_quantized.py -m gpu

needs_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


def gpu(test):
    for mark in needs_gpu:
        test = mark(test)
    return test


@gpu
@pytest.mark.parametrize(("inputs", "outputs", "group_size"), [*SIZES, (4096, 11008, 128)])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("rows", [1, 5, DENSE_ROWS_GPU, DENSE_ROWS_GPU + 1, 300])
def test_gpu_layer_computes_what_the_dense_weight_would(inputs, outputs, group_size, sym, rows):
    layer, weight, bias = build(inputs, outputs, group_size=group_size, sym=sym, device="cuda")
    rows = random_rows(rows, inputs, device="cuda").bfloat16()
    assert_close(layer(rows), rows, weight, bias)


@gpu
@pytest.mark.parametrize(("inputs", "outputs", "group_size"), SIZES)
def test_gpu_form_is_understood_and_unpacks(inputs, outputs, group_size):
    layer, weight, _ = build(inputs, outputs, group_size=group_size, device="cuda")
    assert int4_kernels.can_unpack(layer.packed.device, inputs, group=layer.group)
    assert (layer.dequantized_weight() - weight).abs().max() <= ROUNDING * weight.abs().max()


@gpu
def test_move_between_cpu_and_gpu_packs_anew():
    layer, weight, bias = build(256, 80, group_size=64)
    before = layer.dequantized_weight()
    rows = random_rows(3, 256)
    moved = layer.to("cuda")
    assert_close(moved(rows.cuda()).cpu(), rows, weight, bias)
    assert torch.equal(moved.dequantized_weight().cpu(), before)
    back = moved.to("cpu")
    assert_close(back(rows), rows, weight, bias)


def test_order_of_inputs_on_a_gpu_is_its_own_inverse():
    rows = torch.arange(512).view(2, 256)
    ordered = int4_kernels.order_for_gpu(rows, group=128)
    assert not torch.equal(ordered, rows)
    assert torch.equal(ordered.view(2, 2, 128).sort().values.view(2, 256), rows)
    assert torch.equal(int4_kernels.order_for_gpu(ordered, group=128), rows)


def test_groups_that_our_kernel_does_not_know_keep_the_order_of_their_inputs():
    rows = torch.arange(256).view(2, 128)
    assert int4_kernels.order_for_gpu(rows, group=64) is rows
