"""The GPU's kernels: what they compute, by Triton's interpreter on a CPU and compiled on a GPU."""

from __future__ import annotations

import importlib
import sys
from functools import partial
from types import ModuleType

import pytest
import torch
from golden_v1 import load_tiny
from tiny_model import build_tiny_model

from qwen import int4_kernels
from qwen.cuda_graphs import GraphedDecoder, StepParts
from qwen.decoder import Decoder, ForwardParts, Piece, finish, project
from qwen.decoder_ops import rotate_and_store
from qwen.quantized import Int4Linear

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="module")
def kernels() -> ModuleType:
    """Import `qwen.gpu_kernels`; without a GPU Triton interprets them, see conftest.py."""
    if sys.platform != "linux":
        pytest.skip("Triton is made for Linux")
    return importlib.import_module("qwen.gpu_kernels")


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


def relative_error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    return float((actual.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 2), (300, 10), (2080, 6)])
def test_row_times_dense_matrix(kernels, inputs, outputs, dtype):
    x, weight = random(1, inputs, dtype=dtype), random(outputs, inputs, seed=1, dtype=dtype)
    bias, add = random(outputs, seed=2, dtype=dtype), random(1, outputs, seed=3, dtype=dtype)
    product = x.double() @ weight.double().t()
    limit = 8e-3 if dtype == torch.bfloat16 else 1e-6
    for extra in ((None, None), (bias, None), (None, add), (bias, add)):
        exact = product + sum(each.double() for each in extra if each is not None)
        assert relative_error(kernels.multiply_row(x, weight, *extra), exact) < limit


def pack(codes: torch.Tensor) -> torch.Tensor:
    """Pack as a GPU does, after the order in torch's source (aten/native/cuda/int4mm.cu)."""
    if DEVICE == "cuda":
        return int4_kernels.pack(codes)
    outputs, inputs = codes.shape
    places = codes.long().view(outputs // 8, 8, inputs // 128, 4, 2, 2, 4, 2)
    nibbles = places.permute(0, 2, 1, 6, 3, 7, 4, 5).reshape(outputs // 8, inputs // 128, 32, 4, 8)
    words = (nibbles << (4 * torch.arange(8))).sum(-1)
    return torch.where(words < 2**31, words, words - 2**32).to(torch.int32)


@pytest.mark.parametrize("block", range(3))
@pytest.mark.parametrize(("inputs", "outputs"), [(128, 64), (640, 128)])
def test_row_times_int4_matrix(kernels, monkeypatch, inputs, outputs, block):
    blocks = kernels._INT4_BLOCKS
    monkeypatch.setattr(kernels, "_INT4_BLOCKS", ((0, blocks[block][1]),))
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (outputs, inputs), dtype=torch.uint8, generator=generator)
    codes = codes.to(DEVICE)
    scales = random(inputs // 128, outputs, 2, seed=1) * 0.01
    x, bias, add = random(1, inputs), random(outputs, seed=2), random(1, outputs, seed=3)
    scale, offset = scales.double().repeat_interleave(128, 0).unbind(-1)
    exact = x.double() @ ((codes.double().t() - 8) * scale + offset)
    packed = pack(codes)
    assert relative_error(kernels.multiply_row_int4(x, packed, scales, None, None), exact) < 8e-3
    exact = exact + bias.double() + add.double()
    assert relative_error(kernels.multiply_row_int4(x, packed, scales, bias, add), exact) < 8e-3


def test_sizes_that_the_int4_kernel_takes(kernels):
    takes = kernels.can_multiply_int4
    assert takes(out_features=4096, in_features=11008, group=128)
    assert not takes(out_features=4096, in_features=11008, group=64)
    assert not takes(out_features=4096, in_features=11072, group=128)
    assert not takes(out_features=4104, in_features=11008, group=128)


@pytest.mark.parametrize("shared", [1, 3])
@pytest.mark.parametrize("dim", [8, 32, 40])
@pytest.mark.parametrize("longest", [50, 128, 700])
def test_rows_attend_to_their_own_positions_only(kernels, shared, dim, longest):
    rows, kv_heads, capacity = 3, 2, longest + 9
    options = {"dtype": torch.float32}
    query = random(rows, kv_heads, shared, dim, **options)
    keys = random(rows, kv_heads, capacity, dim, seed=1, **options)
    values = random(rows, kv_heads, capacity, dim, seed=2, **options)
    positions = torch.tensor([longest - 1, longest // 2, 0], device=DEVICE)
    seen = (torch.arange(capacity, device=DEVICE) <= positions[:, None])[:, None, None]
    exact = torch.nn.functional.scaled_dot_product_attention(
        query.double(), keys.double(), values.double(), attn_mask=seen, scale=0.3
    )
    # What lies behind a row's position may be anything.
    hidden = ~seen[:, 0, 0, :, None].expand(rows, capacity, dim)
    for memory in (keys, values):
        memory.masked_fill_(hidden[:, None], torch.nan)
    actual = kernels.attend_rows(query, keys, values, positions, longest=longest, scale=0.3)
    torch.testing.assert_close(actual.double(), exact, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("has_logn", [True, False])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "rotary_dim"), [(4, 4, 16, 16), (6, 2, 40, 8)]
)
def test_rotation_by_our_kernel_equals_torchs(kernels, heads, kv_heads, dim, rotary_dim, has_logn):
    tokens, options = 5, {"dtype": torch.float32}
    qkv = random(tokens, (heads + 2 * kv_heads) * dim, **options)
    cos = random(tokens, rotary_dim, seed=1, **options)
    sin = random(tokens, rotary_dim, seed=2, **options)
    logn = random(tokens, seed=3, **options) if has_logn else None
    positions = torch.arange(7, 7 + tokens, device=DEVICE)
    results = []
    for rotate in (kernels.rotate_and_store, rotate_and_store):
        # A sequence's part of a larger memory.
        memory = torch.zeros(2, 3, kv_heads, 20, dim, device=DEVICE)[:, 1]
        query = rotate(qkv.clone(), memory[0], memory[1], positions, cos, sin, logn)
        results.append((query, memory))
    (query, memory), (expected_query, expected_memory) = results
    torch.testing.assert_close(query, expected_query)
    torch.testing.assert_close(memory, expected_memory)


@pytest.mark.parametrize("make", [build_tiny_model, load_tiny])
def test_steps_by_our_kernels_equal_the_plain_decoders(kernels, make):
    from qwen.gpu_ops import GpuOps

    def attend(positions, longest, scale):
        return partial(kernels.attend_rows, positions=positions, longest=longest, scale=scale)

    def read(decoder, ids):
        others = [decoder.start(40), decoder.start(70)]
        first, second = [Piece(ids[at:][:30], own) for at, own in enumerate(others)]
        logits = [rows.clone() for rows in decoder.read_many([first, second])]
        for ids_of_other, sequence in ((ids[30:40], others[0]), (ids[40:52], others[1])):
            logits.append(decoder.read(ids_of_other, sequence).clone())
        logits += [decoder.read(token, others[1]).clone() for token in ids[60:].split(1)]
        return torch.stack(logits)

    def record(work):
        result = work()
        return lambda: result.copy_(work()), result

    ids = torch.arange(66, device=DEVICE) * 7 % 290
    decoder = GraphedDecoder(make().to(DEVICE), record=record)
    parts = StepParts(ForwardParts(GpuOps(), project=project, finish=finish), attend=attend)
    decoder._step_parts[True] = parts
    decoder._rotate = kernels.rotate_and_store
    with torch.inference_mode():
        actual, expected = read(decoder, ids), read(Decoder(make().to(DEVICE)), ids)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA GPU")
@pytest.mark.parametrize("shared", [1, 7])
def test_rows_attend_in_bfloat16(kernels, shared):
    query = random(2, 4, shared, 64)
    keys, values = random(2, 4, 2000, 64, seed=1), random(2, 4, 2000, 64, seed=2)
    positions = torch.tensor([1999, 700], device=DEVICE)
    seen = (torch.arange(2000, device=DEVICE) <= positions[:, None])[:, None, None]
    exact = torch.nn.functional.scaled_dot_product_attention(
        query.double(), keys.double(), values.double(), attn_mask=seen, scale=0.125
    )
    actual = kernels.attend_rows(query, keys, values, positions, longest=2048, scale=0.125)
    torch.testing.assert_close(actual.double(), exact, atol=5e-3, rtol=1e-2)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA GPU")
def test_joined_int4_layers_compute_what_each_does(kernels):
    from qwen.gpu_ops import GpuOps

    layers = [
        Int4Linear(
            torch.randint(0, 16, (256, outputs), dtype=torch.uint8, device="cuda"),
            random(2, outputs, dtype=torch.float32).abs() * 0.01,
            torch.full((2, outputs), 8, dtype=torch.uint8, device="cuda"),
            group_size=128,
        )
        for outputs in (64, 96)
    ]
    x = random(1, 256)
    expected = torch.cat([layer(x) for layer in layers], dim=-1)
    assert Int4Linear.can_join(layers)
    joined = Int4Linear.joined(layers)
    for actual in (
        joined(x),
        GpuOps().linear(joined, x),
        torch.cat([layer(x) for layer in layers], dim=-1),
    ):
        assert relative_error(actual, expected.double()) < 8e-3
