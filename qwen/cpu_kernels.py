"""The decoder's own CPU kernels: compiled once, kept in the cache, checked before use.

Compiles `qwen/kernels/` for this CPU with the system's C++ compiler and calls it through a plain
C interface. All tensors are float32, contiguous and on the CPU unless a method says otherwise;
packed weights and stores of keys and values have layouts that only the kernels know. A token's
results do not depend on which tokens are computed with it, nor on the number of threads.
Knows no model.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from qwen.kernel_arguments import (
    CHeads,
    CSequence,
    CWeights,
    KernelLayers,
    NewTokens,
    PackedLinear,
)

logger = logging.getLogger(__name__)

SOURCES = Path(__file__).with_name("kernels")
#: No `-ffast-math`: sums keep their order. Without `-lgomp` at the link, `GOMP_*` is found in the
#: OpenMP library that torch has loaded, so that both share one pool of threads.
_COMPILE = (
    *("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fno-strict-aliasing"),
    *("-std=c++17", "-fPIC", "-fopenmp", "-c"),
)
#: Seconds after which a compiler is given up.
_TIME_LIMIT = 120

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

_P, _L, _I, _F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
_SIGNATURES: dict[str, tuple[list[type], type | None]] = {
    "group_size": ([], _L),
    "row_block": ([], _L),
    "packed_bytes": ([], _L),
    "position_block": ([], _L),
    "position_room": ([_L], _L),
    "pack": ([_P, _I, _L, _L, _P, _P, _I], None),
    "unpack": ([_P, _P, _L, _L, _P], None),
    "linear": ([_P, _P, _L, _P, _I, _I], None),
    "rms_norm": ([_P, _P, _F, _L, _L, _P, _I], None),
    "silu_mul": ([_P, _L, _L, _P, _I], None),
    "rotate_and_store": ([_P, _P, _L, _L, CHeads, _L, _I], None),
    "attend": ([_P, _P, _L, _L, CHeads, _F, _P, _I], None),
    "run_layers": ([_P, _L, _P, _L, CHeads, _L, _F, _F, _P, _I], None),
}


class KernelsUnavailable(Exception):
    """There are no kernels for this machine; the text says why. Never shown to a user as it is."""


def load_kernels(folder: Path) -> CpuKernels:
    """Load the kernels, compiling them first if the folder has none for this machine.

    Args:
        folder: Where compiled kernels are kept; made if missing.

    Raises:
        KernelsUnavailable: No compiler, a compiler that fails, or kernels that compute wrongly.
    """
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if compiler is None:
        raise KernelsUnavailable("no C++ compiler (c++, g++ or clang++) is installed")
    try:
        library = folder / f"cpu_kernels-{_fingerprint(compiler)}.so"
        if not library.exists():
            folder.mkdir(parents=True, exist_ok=True)
            _compile(compiler, library)
        kernels = CpuKernels(ctypes.CDLL(str(library)))
    except (OSError, subprocess.SubprocessError) as error:
        output = getattr(error, "stderr", None) or str(error)
        raise KernelsUnavailable(f"{compiler} failed: {output.strip()[:500]}") from error
    kernels.check()
    return kernels


def _fingerprint(compiler: str) -> str:
    """Name what the compiled file depends on: source, flags, compiler, kind of CPU."""
    version = subprocess.run(
        [compiler, "--version"], capture_output=True, text=True, timeout=_TIME_LIMIT, check=True
    ).stdout
    sources = [path.read_text("utf-8") for path in sorted(SOURCES.iterdir())]
    parts = (*sources, " ".join(_COMPILE), version, _cpu_flags())
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _cpu_flags() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
        return next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        return platform.processor() + platform.machine()


def _compile(compiler: str, library: Path) -> None:
    """Compile into the library's name, whole or not at all, whoever else does the same."""
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        compiled, linked = Path(scratch, "kernels.o"), Path(scratch, "kernels.so")
        for command in (
            [compiler, *_COMPILE, str(SOURCES / "kernels.cpp"), "-o", str(compiled)],
            [compiler, "-shared", str(compiled), "-o", str(linked)],
        ):
            subprocess.run(command, capture_output=True, text=True, timeout=_TIME_LIMIT, check=True)
        os.replace(linked, library)


class CpuKernels:
    """The compiled kernels as functions on tensors. May be used from any thread.

    Args:
        library: Compiled from `qwen/kernels/`.

    Attributes:
        group_size: Inputs that share a scale.
        row_block: Outputs that lie together in packed weights.
        position_block: Positions that lie together in a store of keys.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        for name, (arguments, result) in _SIGNATURES.items():
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, result
        self._library = library
        self.group_size: int = library.group_size()
        self.row_block: int = library.row_block()
        self.position_block: int = library.position_block()

    def position_room(self, dim: int) -> int:
        """Return the 16-bit numbers that a store holds for a position of a head: these and more."""
        room: int = self._library.position_room(dim)
        return room

    def pack(self, *weights: Tensor) -> tuple[Tensor, Tensor]:
        """Quantise the weight of a linear layer, or of several as one with the outputs of all.

        Args:
            weights: (out, in) each, float32, bfloat16 or float16.

        Returns:
            Values of 6 bits (blocks, bytes), uint8, and scales (blocks, groups * row_block),
            bfloat16; a block is of `row_block` outputs, the last one padded.
        """
        if any(len(weight) % self.row_block for weight in weights[:-1]):
            weights = (torch.cat([weight.detach() for weight in weights]),)
        columns, rows = weights[0].shape[1], sum(len(weight) for weight in weights)
        groups, blocks = -(-columns // self.group_size), -(-rows // self.row_block)
        packed = torch.empty(blocks, groups * self._library.packed_bytes(), dtype=torch.uint8)
        scales = torch.empty(blocks, groups * self.row_block, dtype=torch.bfloat16)
        first = 0
        for weight in weights:
            weight = weight.detach().contiguous()
            self._library.pack(
                weight.data_ptr(), _DTYPES[weight.dtype], *weight.shape,
                packed[first:].data_ptr(), scales[first:].data_ptr(), torch.get_num_threads(),
            )  # fmt: skip
            first += len(weight) // self.row_block
        return packed, scales

    def unpack(self, packed: Tensor, scales: Tensor, *, shape: tuple[int, int]) -> Tensor:
        """Return the dense weight (out, in) that packed weights stand for."""
        weight = torch.empty(shape)
        self._library.unpack(packed.data_ptr(), scales.data_ptr(), *shape, weight.data_ptr())
        return weight

    def linear(
        self,
        x: Tensor,
        packed: Tensor,
        scales: Tensor,
        outputs: int,
        bias: Tensor | None = None,
        *,
        out: Tensor | None = None,
    ) -> Tensor:
        """Multiply rows by packed weights: (tokens, in) → (tokens, out).

        Args:
            x: (tokens, in).
            packed: From `pack`.
            scales: From `pack`.
            outputs: Outputs without padding.
            bias: (out,).
            out: What the result is added to, in place.
        """
        tokens, columns = x.shape
        adds = out is not None
        if out is None:
            out = torch.empty(tokens, outputs)
        weights = CWeights.of(PackedLinear(packed, scales, bias, outputs, columns))
        self._library.linear(
            ctypes.byref(weights), x.data_ptr(), tokens, out.data_ptr(), adds,
            torch.get_num_threads(),
        )  # fmt: skip
        return out

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Normalise rows (tokens, size) and weight them."""
        out = torch.empty_like(x)
        self._library.rms_norm(
            x.data_ptr(), weight.data_ptr(), eps, *x.shape, out.data_ptr(), torch.get_num_threads()
        )
        return out

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """Compute silu(gate) * up of (tokens, 2 * size), gate first."""
        tokens, size = gate_up.shape[0], gate_up.shape[1] // 2
        out = torch.empty(tokens, size)
        self._library.silu_mul(
            gate_up.data_ptr(), tokens, size, out.data_ptr(), torch.get_num_threads()
        )
        return out

    def attend(
        self,
        qkv: Tensor,
        keys: Tensor,
        values: Tensor,
        *,
        start: int,
        cos: Tensor,
        sin: Tensor,
        logn: Tensor | None,
        scale: float,
    ) -> Tensor:
        """Rotate new queries and keys, store keys and values, attend causally.

        Args:
            qkv: (tokens, (heads + 2 * kv_heads) * dim); changed.
            keys: (kv_heads, capacity, `position_room`), int16, in the kernels' own order within
                each `position_block`; written from `start` on. The capacity is whole blocks, and
                dim is even.
            values: As `keys`.
            start: Position of the first new token.
            cos: (tokens, rotary_dim).
            sin: As `cos`.
            logn: (tokens,), factors of the queries.
            scale: Factor of the scores.

        Returns:
            (tokens, heads * dim).
        """
        tokens, width = qkv.shape
        kv_heads, dim = len(keys), keys.shape[2] - self.position_room(0)
        heads = CHeads(width // dim - 2 * kv_heads, kv_heads, dim)
        new = NewTokens(tokens, start, keys, values, cos, sin, logn)
        sequences, threads = self._sequences([new]), torch.get_num_threads()
        out = torch.empty(tokens, heads.queries * dim)
        self._library.rotate_and_store(
            qkv.data_ptr(), sequences, 1, 0, heads, cos.shape[-1], threads
        )
        self._library.attend(qkv.data_ptr(), sequences, 1, 0, heads, scale, out.data_ptr(), threads)
        return out

    def run_layers(
        self,
        hidden: Tensor,
        layers: KernelLayers,
        new: Sequence[NewTokens],
        *,
        eps: float,
        scale: float,
    ) -> None:
        """Run all layers of a model for new tokens of several sequences, in one call.

        Args:
            hidden: (tokens of all sequences, hidden_size), in the order of `new`; changed to the
                last hidden states.
            layers: The model.
            new: The tokens; keys and values are those of the first layer, behind which the others
                follow.
            eps: Of the norms.
            scale: Factor of the attention's scores.
        """
        assert sum(each.tokens for each in new) == len(hidden) and hidden.is_contiguous()
        self._library.run_layers(
            layers.table, len(layers.table), self._sequences(new), len(new), layers.heads,
            new[0].cos.shape[-1], eps, scale, hidden.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip

    def _sequences(self, new: Sequence[NewTokens]) -> ctypes.Array[CSequence]:
        for each in new:
            _, capacity, room = each.keys.shape
            assert each.start + each.tokens <= capacity and capacity % self.position_block == 0
            assert each.keys.dtype is torch.int16 and room % 2 == 0 and room <= 1024
        return (CSequence * len(new))(*map(CSequence.of, new))

    def check(self) -> None:
        """Compare a product with torch's: a compiler may be wrong, or a file of another machine.

        Raises:
            KernelsUnavailable: They differ.
        """
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(37, 2 * self.group_size + 5, generator=generator)
        x = torch.randn(6, weight.shape[1], generator=generator)
        packed, scales = self.pack(weight)
        product = self.linear(x, packed, scales, len(weight))
        rows = torch.cat([self.linear(row[None], packed, scales, len(weight)) for row in x])
        # Measured: 0.022 of the norm of the product are lost with 6 bits.
        wrong = (product - x @ weight.T).norm() > 0.06 * product.norm()
        if wrong or not torch.equal(product, rows):
            raise KernelsUnavailable("the compiled kernels compute wrongly")
