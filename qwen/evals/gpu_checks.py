"""Whether what runs on a GPU computes what it should: each check one line, with its measured error.

Needs the golden data of the published Qwen v1 code (`tests/data/golden`); random weights elsewhere.
Runs on a CPU too, as a dry run.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwen.decoder import Decoder
from qwen.decoder_ops import TorchOps
from qwen.engine import Engine
from qwen.messages import SamplingParams

#: Seconds that compiling kernels in the background may take.
_COMPILE_SECONDS = 180


@dataclass(frozen=True, slots=True)
class Check:
    """A comparison: the largest difference or the number of unequal things, and its limit."""

    name: str
    error: float
    limit: float

    @property
    def is_right(self) -> bool:
        """Whether the error is within its limit; one that is no number is not."""
        return self.error <= self.limit

    def __str__(self) -> str:
        """`name: error E, limit L: right`."""
        verdict = "right" if self.is_right else "WRONG"
        return f"{self.name}: error {self.error:.3g}, limit {self.limit:.3g}: {verdict}"


@dataclass(frozen=True, slots=True)
class Golden:
    """What the published code computed on a tiny checkpoint, float32 on a CPU."""

    folder: Path
    cases: dict[str, Any]
    tensors: dict[str, Tensor]

    @classmethod
    def read(cls, folder: Path) -> Golden:
        """Read the golden data in a folder."""
        from safetensors.torch import load_file

        cases = json.loads((folder / "cases.json").read_text("utf-8"))
        return cls(folder, cases, load_file(folder / "logits.safetensors"))

    def model(self, device: str, dtype: torch.dtype = torch.float32) -> Any:
        """Load the tiny checkpoint."""
        from qwen import AutoModelForCausalLM

        model: Any = AutoModelForCausalLM.from_pretrained(self.folder / "tiny_qwen", dtype=dtype)
        return model.to(device).eval()

    def ids(self, start: int, stop: int, device: str) -> Tensor:
        """Return the tokens that the cases slice, (stop - start,)."""
        return self.tensors["ids"][start:stop].long().to(device)

    def lengths(self) -> list[int]:
        """Return the lengths of prompts with NTK and log-n."""
        names = [name for name in self.cases if name.startswith("b.ntk1.logn1.")]
        return sorted(self.cases[name]["length"] for name in names if name.endswith(".cols"))


@torch.inference_mode()
def run_checks(golden_folder: Path, device: str) -> Iterator[Check]:
    """Yield all checks; matrix products stay in full float32 (TF32 off)."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    golden = Golden.read(golden_folder)
    model = golden.model(device)
    exact = partial(_full_forward, model, device=device)
    for length in golden.lengths():
        error = _golden_error(golden, exact, length, device)
        yield Check(f"golden prompt of {length}, Transformers class, float32", error, 2e-4)
    yield from _decoder_checks(golden, device)
    half = partial(_full_forward, golden.model(device, torch.bfloat16), device=device)
    error = _golden_error(golden, half, 200, device, mean=True)
    # The published code in bfloat16 is 0.05 from its float32 on the mean.
    yield Check("golden prompt of 200, bfloat16 against float32, mean", error, 0.1)
    yield from _attention_checks(device)
    yield _int4_check(device)
    yield from _batch_checks(golden, device)


def _full_forward(model: Any, ids: Tensor, *, device: str) -> Tensor:
    logits: Tensor = model(ids[None].to(device), use_cache=False).logits[0]
    return logits


def _golden_error(
    golden: Golden,
    forward: Callable[[Tensor], Tensor],
    length: int,
    device: str,
    *,
    mean: bool = False,
) -> float:
    logits = forward(golden.ids(0, length, device)).float().cpu()
    columns = golden.tensors["cols"].long()
    expected = golden.tensors[f"b.ntk1.logn1.L{length}.cols"].float()
    difference = (logits[:, columns] - expected).abs()
    return float(difference.mean() if mean else difference.max())


def _decoder_checks(golden: Golden, device: str) -> Iterator[Check]:
    """Compare prompts and steps of the decoder, plain and by graphs, with the golden ones."""
    from qwen.cuda_graphs import GraphedDecoder, make_step_parts

    plain = Decoder(golden.model(device))
    yield Check("golden steps, decoder, float32", _step_error(golden, plain, device), 2e-4)
    if device != "cuda":
        return
    graphed = GraphedDecoder(golden.model(device))
    yield Check("golden steps, CUDA graphs", _step_error(golden, graphed, device), 2e-4)
    with_kernels = GraphedDecoder(golden.model(device), make_parts=make_step_parts)
    wait_for_compilation()
    own = with_kernels.has_own_kernels
    error = _step_error(golden, with_kernels, device) if own else float("inf")
    yield Check("golden steps, CUDA graphs, our kernels", error, 2e-4)


def wait_for_compilation() -> None:
    """Wait until kernels that are compiled in the background are ready."""
    for thread in threading.enumerate():
        if thread.name == "compile":
            thread.join(_COMPILE_SECONDS)


def _step_error(golden: Golden, decoder: Decoder, device: str) -> float:
    case = golden.cases["c.ntk1.logn1.prefill100.steps30"]
    expected = golden.tensors["c.ntk1.logn1.prefill100.steps30"].float()
    first = case["prefill"]
    sequence = decoder.start(first)
    rows = [decoder.read(golden.ids(0, first, device), sequence).clone()]
    for place in range(first, first + case["steps"]):
        rows.append(decoder.read(golden.ids(place, place + 1, device), sequence).clone())
    return float((torch.stack(rows).float().cpu() - expected).abs().max())


def _attention_checks(device: str) -> Iterator[Check]:
    """Compare the fast attention kernels with the plain one, in bfloat16."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    if device != "cuda":
        return
    generator = torch.Generator(device).manual_seed(0)
    shape = (1, 8, 512, 128)
    query, key, value = (
        torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)
        for _ in range(3)
    )
    exact = scaled_dot_product_attention(query.float(), key.float(), value.float(), is_causal=True)
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
        with sdpa_kernel(backend):
            fast = scaled_dot_product_attention(query, key, value, is_causal=True)
        yield Check(f"sdpa by {backend.name}, bfloat16", float((fast - exact).abs().max()), 0.02)
    try:
        from flash_attn import flash_attn_func
    except ImportError:
        return
    fast = flash_attn_func(*(t.transpose(1, 2) for t in (query, key, value)), causal=True)
    error = float((fast.transpose(1, 2) - exact).abs().max())
    yield Check("flash-attn, bfloat16", error, 0.02)


def _int4_check(device: str) -> Check:
    """Compare Int4 products of few and of many rows with those of the dequantised weights."""
    from qwen.quantized import Int4Linear

    ops = TorchOps()
    if device == "cuda":
        from qwen.gpu_ops import GpuOps

        ops = GpuOps()

    generator = torch.Generator(device).manual_seed(0)
    inputs, outputs, group = 4096, 1024, 128
    options: dict[str, Any] = {"device": device, "generator": generator}
    codes = torch.randint(0, 16, (inputs, outputs), dtype=torch.uint8, **options)
    scales = torch.rand(inputs // group, outputs, **options) * 0.01 + 0.001
    zeros = torch.randint(0, 16, (inputs // group, outputs), dtype=torch.uint8, **options)
    layer = Int4Linear(codes, scales, zeros, group_size=group, bias=None)
    x = torch.randn(300, inputs, **options).bfloat16()
    repeated = (each.float().repeat_interleave(group, 0) for each in (zeros, scales))
    zero, scale = repeated
    exact = x.float() @ ((codes.float() - zero) * scale)
    errors = [
        (ops.linear(layer, x[:rows]).float() - exact[:rows]).norm() / exact[:rows].norm()
        for rows in (1, 5, 20, 300)
    ]
    return Check("Int4 products against dequantised weights, relative", float(max(errors)), 0.01)


def _batch_checks(golden: Golden, device: str) -> Iterator[Check]:
    """Count the tokens of replies that differ when prompts are answered at once."""
    from qwen.fast_decoder import build_decoder

    model = golden.model(device)
    engine = Engine(
        model, eos_token_ids=(), context_length=512, decoder=build_decoder(model), prefix_bytes=0
    )
    wait_for_compilation()
    prompts = [golden.ids(0, length, "cpu").tolist() for length in (11, 32, 70, 150)]
    alone = [reply(engine, prompt, 40) for prompt in prompts]
    together: list[list[int]] = [[] for _ in prompts]

    def answer(place: int) -> None:
        together[place] = reply(engine, prompts[place], 40)

    threads = [threading.Thread(target=answer, args=(place,)) for place in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    engine.close()
    pairs = zip(alone, together, strict=True)
    wrong = sum(a != b for first, second in pairs for a, b in zip(first, second, strict=True))
    yield Check("tokens that differ: four prompts (alpha 1 to 7) at once, alone", wrong, 0)


def reply(engine: Engine, ids: list[int], new_tokens: int) -> list[int]:
    """Return a greedy reply's tokens."""
    params = SamplingParams(temperature=0, repetition_penalty=1.0, max_new_tokens=new_tokens)
    steps = engine.submit(ids, params, cancel=threading.Event())
    return [step.token_id for step in steps if step.token_id is not None]
