"""Compile the GPU's kernels for an H100, without one; print what they do in which order, as JSON.

Run as a process of its own: where Triton interprets, it compiles nothing.
"""

from __future__ import annotations

import json
import re
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from qwen import triton_attention, triton_products

SIZES = {"inputs", "outputs", "row_stride", "head_stride"}
EVENTS = re.compile(r"griddepcontrol\.wait|ld\.global|st\.global|cp\.async\.c|mma\.sync")
COMMON = {"HAS_BIAS": True, "HAS_ADD": True, "IS_GATED": False, "CHAINED": True}
INT4 = COMMON | {"IS_COMPILED": True, "PAIRS": 1, "GROUPS": 4, "STEPS": 8}
BF16, INT32, FLOAT32 = "*bf16", "*i32", "*fp32"
ROWS = {"bias_ptr": BF16, "add_ptr": BF16, "out_ptr": BF16, "inputs": "i32", "outputs": "i32"}


def compile_kernel(
    kernel: Any, types: dict[str, str], constants: dict[str, Any], warps: int
) -> Any:
    names = kernel.arg_names
    aligned = [n for n in names if types.get(n, "").startswith("*") or n in SIZES]
    source = ASTSource(
        fn=kernel,
        signature={name: types.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"num_warps": warps, "launch_pdl": constants.get("CHAINED", False)}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def kernels() -> dict[str, tuple[Any, dict[str, str], dict[str, Any], int]]:
    products, attention = triton_products, triton_attention
    int4 = ROWS | {"x_ptr": INT32, "packed_ptr": INT32, "scales_ptr": INT32, "rows": "i32"}
    dense = ROWS | {"x_ptr": BF16, "weight_ptr": BF16}
    del dense["outputs"]
    tables = dict.fromkeys(("cos_ptr", "sin_ptr", "logn_ptr"), FLOAT32)
    states = {"qkv_ptr": BF16, "keys_ptr": BF16, "values_ptr": BF16, "positions_ptr": "*i64"}
    scratch = {"sums_ptr": FLOAT32, "norms_ptr": FLOAT32, "done_ptr": INT32, "out_ptr": BF16}
    numbers = {"row_stride": "i64", "head_stride": "i64", "scale": "fp32", "chunk": "i32"}
    heads = {"KV_HEADS": 32, "DIM": 128, "WIDTH": 128, "ROTARY_DIM": 128, "HAS_LOGN": True}
    norm = {"x_ptr": BF16, "weight_ptr": BF16, "out_ptr": BF16, "size": "i32", "eps": "fp32"}
    return {
        "rms_norm": (products.rms_norm, norm, {"WIDTH": 4096, "CHAINED": True}, 8),
        "gate": (
            products.gate,
            {"x_ptr": BF16, "out_ptr": BF16, "size": "i32"},
            {"BLOCK": 1024, "CHAINED": True},
            4,
        ),
        "dense_row": (
            products.dense_row,
            dense,
            COMMON | {"ROWS": 2, "COLUMNS": 2048, "STEPS": 2},
            8,
        ),
        "int4_rows of one": (products.int4_rows, int4, INT4 | {"IS_SINGLE": True}, 4),
        "int4_rows": (products.int4_rows, int4, INT4 | {"IS_SINGLE": False}, 4),
        "int4_weights": (
            products.int4_weights,
            dict.fromkeys(("packed_ptr", "scales_ptr", "out_ptr"), INT32) | {"groups": "i32"},
            {"ROWS": 16, "CHAINED": True},
            4,
        ),
        "attend_rows": (
            attention.attend_rows,
            states | tables | scratch | numbers,
            heads
            | {"SHARED": 1, "PADDED": 16, "CHAINED": True, "PARTS": 8, "BLOCK": 64, "STAGES": 2},
            4,
        ),
        "rotate_and_store": (
            attention.rotate_and_store,
            states | tables | {"query_ptr": BF16, "head_stride": "i64"},
            heads | {"HEADS": 32, "BLOCK": 8},
            4,
        ),
        "rotation": (
            attention.rotation,
            {"positions_ptr": "*i64", "inv_freq_ptr": FLOAT32, "scale": "fp32"}
            | tables
            | {"logn_length": "i32"},
            {"HALF": 64, "WIDTH": 64, "HAS_LOGN": True, "IS_COMPILED": True},
            1,
        ),
    }


def main() -> None:
    compiled = {}
    for name, arguments in kernels().items():
        kernel = compile_kernel(*arguments)
        layouts = set(re.findall(r"inline_asm.*tensor<\S+, (#\w+)>", kernel.asm["ttgir"]))
        compiled[name] = {
            "events": EVENTS.findall(kernel.asm["ptx"]),
            "layouts": [
                line.split(" = ", 1)[1]
                for line in kernel.asm["ttgir"].splitlines()
                if line.split(" = ", 1)[0] in layouts
            ],
        }
    print(json.dumps(compiled))


if __name__ == "__main__":
    main()
