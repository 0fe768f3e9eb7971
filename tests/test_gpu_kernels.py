"""The GPU's kernels: what they compute, by Triton's interpreter on a CPU and compiled on a GPU."""

from __future__ import annotations

import importlib
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from golden_v1 import load_tiny
from tiny_model import build_tiny_model

from qwen import cuda_graphs, int4_kernels
from qwen.cuda_graphs import GraphedDecoder, StepParts, make_step_parts
from qwen.decoder import Decoder, Piece
from qwen.decoder_ops import PromptRows, Rotation, attend_masked, rotate_and_store
from qwen.evals.gpu_checks import wait_for_compilation
from qwen.quantized import Int4Linear
from qwen.step_inputs import compute_rotation

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def import_kernels(name: str) -> ModuleType:
    """Import a module of kernels; without a GPU Triton interprets them, see conftest.py."""
    if sys.platform != "linux":
        pytest.skip("Triton is made for Linux")
    return importlib.import_module(name)


@pytest.fixture(scope="module")
def products() -> ModuleType:
    return import_kernels("qwen.gpu_products")


@pytest.fixture(scope="module")
def attention() -> ModuleType:
    return import_kernels("qwen.gpu_attention")


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


def relative_error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    return float((actual.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 4), (300, 12), (2080, 8)])
def test_row_times_dense_matrix(products, inputs, outputs, dtype):
    x = random(1, inputs, dtype=dtype) * 0.1
    weight = random(outputs, inputs, seed=1, dtype=dtype)
    bias, add = random(outputs, seed=2, dtype=dtype), random(1, outputs, seed=3, dtype=dtype)
    assert products.can_multiply(weight)
    exact = x.double() @ weight.double().t()
    limit = 8e-3 if dtype == torch.bfloat16 else 1e-6
    for extra in ((None, None), (bias, None), (None, add), (bias, add)):
        expected = exact + sum(each.double() for each in extra if each is not None)
        assert relative_error(products.multiply_row(x, weight, *extra), expected) < limit
    actual = products.multiply_row(x, weight, is_gated=True)
    assert relative_error(actual, gated(exact)) < 2 * limit  # rounds three times


def test_matrices_that_the_dense_kernel_takes(products):
    assert products.can_multiply(random(8, 300))
    assert not products.can_multiply(random(6, 64))
    assert not products.can_multiply(random(64, 64).t()[:, ::2])


def gated(both: torch.Tensor) -> torch.Tensor:
    gate, other = both.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * other


def pack(codes: torch.Tensor) -> torch.Tensor:
    """Pack as a GPU does, after the order in torch's source (aten/native/cuda/int4mm.cu)."""
    if DEVICE == "cuda":
        return int4_kernels.pack(codes, group=128)
    outputs, inputs = codes.shape
    places = (
        int4_kernels.order_for_gpu(codes, group=128)
        .long()
        .view(outputs // 8, 8, inputs // 128, 4, 2, 2, 4, 2)
    )
    nibbles = places.permute(0, 2, 1, 6, 3, 7, 4, 5).reshape(outputs // 8, inputs // 128, 32, 4, 8)
    words = (nibbles << (4 * torch.arange(8))).sum(-1)
    return torch.where(words < 2**31, words, words - 2**32).to(torch.int32)


@pytest.mark.parametrize("rows", [1, 5, 8, 17])
@pytest.mark.parametrize(
    ("inputs", "outputs", "block"), [(128, 64, (1, 1)), (640, 32, (1, 4)), (640, 64, (2, 2))]
)
def test_rows_times_int4_matrix(products, monkeypatch, inputs, outputs, block, rows):
    pairs, groups = block
    sizes = {"PAIRS": pairs, "GROUPS": groups}
    monkeypatch.setattr(products, "_INT4_BLOCKS", ((inputs, 0, sizes),))
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (outputs, inputs), dtype=torch.uint8, generator=generator)
    codes = codes.to(DEVICE)
    scales = random(inputs // 128, outputs, 2, seed=1) * 0.01
    x, bias, add = random(rows, inputs), random(outputs, seed=2), random(rows, outputs, seed=3)
    scale, offset = scales.double().repeat_interleave(128, 0).unbind(-1)
    exact = x.double() @ ((codes.double().t() - 8) * scale + offset)
    packed = pack(codes)
    assert relative_error(products.multiply_rows_int4(x, packed, scales), exact) < 8e-3
    actual = products.multiply_rows_int4(x, packed, scales, is_gated=True)
    assert relative_error(actual, gated(exact)) < 1.6e-2  # rounds three times
    exact = exact + bias.double() + add.double()
    assert relative_error(products.multiply_rows_int4(x, packed, scales, bias, add), exact) < 8e-3


@pytest.mark.parametrize(("inputs", "outputs"), [(128, 16), (1408, 32)])
def test_unpacked_int4_weights(products, inputs, outputs):
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (outputs, inputs), dtype=torch.uint8, generator=generator)
    scales = random(inputs // 128, outputs, 2, seed=1) * 0.01
    scale, offset = scales.double().repeat_interleave(128, 0).unbind(-1)
    packed = pack(codes.to(DEVICE))
    exact = ((codes.to(DEVICE).double().t() - 8) * scale + offset).t()
    assert relative_error(products.unpack_int4(packed, scales), exact) < 5e-3


def test_many_rows_times_int4_matrix(products):
    inputs, outputs, rows = 256, 48, 70
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (outputs, inputs), dtype=torch.uint8, generator=generator)
    packed, scales = pack(codes.to(DEVICE)), random(2, outputs, 2, seed=1) * 0.01
    x, bias, add = random(rows, inputs), random(outputs, seed=2), random(rows, outputs, seed=3)
    exact = x.double() @ products.unpack_int4(packed, scales).double().t()
    multiply = products.multiply_many_int4
    assert relative_error(multiply(x, packed, scales), exact) < 8e-3
    assert relative_error(multiply(x, packed, scales, bias), exact + bias) < 8e-3
    assert relative_error(multiply(x, packed, scales, None, add.clone()), exact + add) < 8e-3
    both = multiply(x, packed, scales, bias, add.clone())
    assert relative_error(both, exact + bias + add) < 1.6e-2  # rounds twice


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", [64, 300, 2080])
def test_norm_and_gate_equal_torchs(products, size, dtype):
    x, weight = random(3, size, dtype=dtype) * 5, random(size, seed=1, dtype=dtype)
    exact = torch.nn.functional.rms_norm(x.double(), (size,), weight.double(), 1e-3)
    limit = 8e-3 if dtype == torch.bfloat16 else 1e-6
    assert relative_error(products.rms_norm(x, weight, 1e-3), exact) < limit
    assert relative_error(products.gate(x), gated(x.double())) < limit


def test_sizes_that_the_int4_kernel_takes(products):
    takes = products.can_multiply_int4
    assert takes(out_features=4096, in_features=11008, group=128)
    assert not takes(out_features=4096, in_features=11008, group=64)
    assert not takes(out_features=4096, in_features=11072, group=128)
    assert not takes(out_features=4104, in_features=11008, group=128)


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict[str, list[str]]]:
    """What the kernels do in which order, compiled for an H100; needs none."""
    if sys.platform != "linux":
        pytest.skip("Triton is made for Linux")
    environ = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    script = Path(__file__).parent / "compile_kernels.py"
    root = script.parents[1]
    run = subprocess.run(
        [sys.executable, str(script)],
        env=environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    result: dict[str, dict[str, list[str]]] = json.loads(run.stdout)
    return result


def test_chained_kernels_ask_for_weights_before_they_wait_and_touch_nothing_else(compiled):
    loads = {}
    for name, kernel in compiled.items():
        if "griddepcontrol.wait" in kernel["events"]:
            waits = kernel["events"].index("griddepcontrol.wait")
            assert "st.global" not in kernel["events"][:waits], name
            assert "ld.global" in kernel["events"][waits:] or "cp.async.c" in kernel["events"], name
            loads[name] = kernel["events"][:waits].count("ld.global")
    assert {name for name, count in loads.items() if not count} == {
        "gate", "int4_weights", "attend_rows",
    }  # fmt: skip
    assert {name for name, count in loads.items() if count} == {
        "rms_norm", "dense_row", "int4_rows of one", "int4_rows",
    }  # fmt: skip


def test_int4_words_lie_in_lanes_as_the_matrix_units_take_them(compiled):
    for name in ("int4_rows of one", "int4_rows"):
        (layout,) = compiled[name]["layouts"]
        assert "sizePerThread = [4], threadsPerWarp = [32], warpsPerCTA = [4]" in layout
        assert "mma.sync" in compiled[name]["events"]


@pytest.mark.parametrize("rows", [1, 9, 32, 33])
def test_operations_take_int4_layers_of_any_number_of_rows(products, rows):
    from qwen.gpu_ops import GpuOps

    inputs, outputs = 256, 64
    generator = torch.Generator().manual_seed(3)
    codes = torch.randint(0, 16, (inputs, outputs), dtype=torch.uint8, generator=generator)
    layer = Int4Linear(
        codes.to(DEVICE),
        random(2, outputs, seed=1, dtype=torch.float32).abs() * 0.01,
        torch.full((2, outputs), 7, dtype=torch.uint8, device=DEVICE),
        group_size=128,
        bias=random(outputs, seed=2),
    )
    layer.packed = pack(codes.t().contiguous().to(DEVICE))  # as a GPU does
    scale, offset = layer.scales.double().repeat_interleave(128, 0).unbind(-1)
    x, add = random(rows, inputs), random(rows, outputs, seed=4)
    exact = x.double() @ ((codes.to(DEVICE).double() - 8) * scale + offset)
    ops, bias = GpuOps(), layer.bias.double()
    assert relative_error(ops.linear(layer, x), exact + bias) < 8e-3
    assert relative_error(ops.linear(layer, x, add.clone()), exact + bias + add) < 1.6e-2
    assert relative_error(ops.gated(layer, x), gated(exact + bias)) < 2e-2
    layer.bias = None
    assert relative_error(ops.linear(layer, x), exact) < 8e-3
    assert relative_error(ops.gated(layer, x), gated(exact)) < 2e-2


def random_rotation(
    positions: torch.Tensor, rotary_dim: int, *, has_logn: bool = False, seed: int = 7
) -> Rotation:
    tokens, options = len(positions), {"dtype": torch.float32}
    cos = random(tokens, rotary_dim, seed=seed, **options)
    sin = random(tokens, rotary_dim, seed=seed + 1, **options)
    logn = random(tokens, seed=seed + 2, **options).abs() if has_logn else None
    return Rotation(positions, cos, sin, logn)


@pytest.mark.parametrize("logn_length", [None, 64])
def test_rotation_of_a_step_equals_torchs(attention, logn_length):
    positions = torch.tensor([0, 77, 32_767], device=DEVICE)
    inv_freq = random(3, 20, dtype=torch.float32).abs()
    arguments = positions, inv_freq, 1.3, logn_length
    actual, expected = attention.compute_rotation(*arguments), compute_rotation(*arguments)
    torch.testing.assert_close(actual.cos, expected.cos, atol=1e-6, rtol=0)
    torch.testing.assert_close(actual.sin, expected.sin, atol=1e-6, rtol=0)
    assert (actual.logn is None) == (logn_length is None)
    if logn_length is not None:
        torch.testing.assert_close(actual.logn, expected.logn, atol=2e-6, rtol=0)


@pytest.mark.parametrize(("shared", "has_logn"), [(1, True), (3, False)])
@pytest.mark.parametrize(("dim", "rotary_dim"), [(8, 8), (32, 32), (40, 8)])
@pytest.mark.parametrize("longest", [50, 256, 700])
def test_rows_attend_to_their_own_positions_only(
    attention, shared, has_logn, dim, rotary_dim, longest
):
    rows, kv_heads, capacity = 3, 2, longest + 9
    options = {"dtype": torch.float32}
    memory = random(2, rows, kv_heads, capacity, dim, seed=1, **options)
    positions = torch.tensor([longest - 1, longest // 2, 0], device=DEVICE)
    rotation = random_rotation(positions, rotary_dim, has_logn=has_logn)
    seen = torch.arange(capacity, device=DEVICE) <= positions[:, None]
    expected_memory = memory.clone()
    # What lies at a row's position and behind it may be anything.
    is_old = torch.arange(capacity, device=DEVICE) < positions[:, None]
    memory.masked_fill_(~is_old[None, :, None, :, None], torch.nan)
    attend = attention.attend_rows(rotation, longest, 0.3)
    plain = attend_masked(rotation, longest, 0.3)
    for layer in range(2):  # the second one, too, finds nothing of the first
        qkv = random(rows, kv_heads * (shared + 2) * dim, seed=layer, **options)
        actual, expected = attend(qkv, *memory), plain(qkv, *expected_memory)
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
        written = seen[None, :, None, :, None].expand_as(memory)
        torch.testing.assert_close(memory[written], expected_memory[written])


@pytest.mark.parametrize("has_logn", [True, False])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "rotary_dim"), [(4, 4, 16, 16), (6, 2, 40, 8)]
)
def test_rotation_by_our_kernel_equals_torchs(
    attention, heads, kv_heads, dim, rotary_dim, has_logn
):
    tokens, options = 5, {"dtype": torch.float32}
    qkv = random(tokens, (heads + 2 * kv_heads) * dim, **options)
    positions = torch.arange(7, 7 + tokens, device=DEVICE)
    rotation = random_rotation(positions, rotary_dim, has_logn=has_logn)
    # A sequence's part of a larger memory.
    memory, expected_memory = torch.zeros(2, 2, 3, kv_heads, 20, dim, device=DEVICE)[:, :, 1]
    query = attention.rotate_and_store(qkv.clone(), *memory, rotation)
    expected = rotate_and_store(
        qkv, *expected_memory, positions, rotation.cos, rotation.sin, rotation.logn
    )
    torch.testing.assert_close(query, expected.transpose(0, 1))
    torch.testing.assert_close(memory, expected_memory)


def attend_one_by_one(rotate):
    """Return what attends as `attend_prompts`, but with one prompt after the other."""

    def prepare(rotation, prompts, scale):
        def attend(qkv, keys, values):
            query = rotate(qkv, keys[0], values[0], rotation).transpose(0, 1)
            mixed = []
            for prompt, own in zip(
                prompts, query.split([prompt.tokens for prompt in prompts], dim=1), strict=True
            ):
                row = prompt.offset // (keys.shape[1] * keys.shape[2])
                seen = [each[row, :, : prompt.length] for each in (keys, values)]
                slots = torch.arange(prompt.length, device=qkv.device)
                mask = slots <= slots[prompt.length - prompt.tokens :, None]
                mixed.append(
                    torch.nn.functional.scaled_dot_product_attention(
                        own[None],
                        *(each[None] for each in seen),
                        attn_mask=mask,
                        scale=scale,
                        enable_gqa=True,
                    )[0].transpose(0, 1)
                )
            return torch.cat(mixed).flatten(1)

        return attend

    return prepare


@pytest.mark.parametrize("make", [build_tiny_model, load_tiny])
def test_steps_by_our_kernels_equal_the_plain_decoders(attention, make):
    from qwen.gpu_ops import GpuOps

    def read(decoder, ids):
        others = [decoder.start(40), decoder.start(70)]
        first, second = [Piece(ids[at:][:30].tolist(), own) for at, own in enumerate(others)]
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
    decoder._step_parts = StepParts(
        GpuOps(),
        rotation=attention.compute_rotation,
        attend=attention.attend_rows,
        attend_prompts=attend_one_by_one(attention.rotate_and_store),
    )
    with torch.inference_mode():
        actual, expected = read(decoder, ids), read(Decoder(make().to(DEVICE)), ids)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("make", [build_tiny_model, load_tiny])
def test_our_kernels_pass_the_comparison_with_torchs(attention, monkeypatch, caplog, make):
    from qwen.gpu_ops import GpuOps

    monkeypatch.setattr(cuda_graphs, "_ROWS_TRIED", (1, 4))
    monkeypatch.setattr(cuda_graphs, "_LONGEST_TRIED", 1024)
    monkeypatch.setattr(cuda_graphs, "has_flash_attention", lambda states: True)
    parts = StepParts(
        GpuOps(),
        rotation=attention.compute_rotation,
        attend=attention.attend_rows,
        attend_prompts=attend_one_by_one(attention.rotate_and_store),
    )
    with caplog.at_level(logging.INFO):
        decoder = GraphedDecoder(make().to(DEVICE), make_parts=lambda: parts)
        wait_for_compilation()
    assert "kernels of the decode loop are compiled" in caplog.text
    assert decoder.has_own_kernels


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [build_tiny_model, load_tiny])
def test_compiled_kernels_pass_the_comparison_with_torchs(make, dtype):
    decoder = GraphedDecoder(make().to("cuda", dtype), make_parts=make_step_parts)
    wait_for_compilation()
    assert decoder.has_own_kernels


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA GPU")
@pytest.mark.parametrize("shared", [1, 7])
def test_rows_attend_in_bfloat16(attention, shared):
    memory = random(2, 2, 4, 2000, 64, seed=1)
    positions = torch.tensor([1999, 700], device=DEVICE)
    rotation, qkv = random_rotation(positions, 64), random(2, 4 * (shared + 2) * 64)
    attend = attention.attend_rows(rotation, 2048, 0.125)
    actual, again = attend(qkv, *memory), attend(qkv, *memory)
    expected = attend_masked(rotation, 2048, 0.125)(qkv, *memory.clone())
    torch.testing.assert_close(actual, expected, atol=2e-2, rtol=1e-2)
    assert torch.equal(actual, again)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA GPU")
@pytest.mark.parametrize("shared", [1, 7])
def test_prompts_attend_at_once_as_one_by_one(attention, shared):
    rows, kv_heads, capacity, dim = 4, 4, 900, 64
    memory = random(2, rows, kv_heads, capacity, dim, seed=1)
    sizes, starts, own = [300, 7, 200], [0, 500, 130], [2, 0, 3]
    row = kv_heads * capacity
    prompts = [
        PromptRows(size, start + size, index * row)
        for size, start, index in zip(sizes, starts, own, strict=True)
    ]
    positions = torch.cat(
        [torch.arange(p.length - p.tokens, p.length, device=DEVICE) + p.offset for p in prompts]
    )
    rotation, qkv = random_rotation(positions, dim), random(sum(sizes), 4 * (shared + 2) * dim)
    actual = attention.attend_prompts(rotation, prompts, 0.125)(qkv, *memory)
    plain = attend_one_by_one(attention.rotate_and_store)
    expected = plain(rotation, prompts, 0.125)(qkv, *memory.clone())
    torch.testing.assert_close(actual, expected, atol=2e-2, rtol=1e-2)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA GPU")
def test_joined_int4_layers_compute_what_each_does(products):
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
