"""A quantised model, tuned as a whole to answer as the dense one does.

Layer by layer (`qwen.quantize_layers`) each layer's own output is kept near; what the errors of all
layers do to the answer together, none of them sees. Here the dense model teaches: of its logits and
the quantised model's, KL(dense ‖ quantised) is minimised over the scales, the norms and the biases,
which the checkpoint stores as plain numbers, so its format stays. That is the end-to-end phase of
EfficientQAT (Chen et al., arXiv:2407.11062), with distillation instead of labels. On request the
codes take part too, by straight-through gradients: a code changes when what is behind it passes
the middle between two. Knows no files.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization
from torch.utils.checkpoint import checkpoint

from qwen.backend import ReportProgress
from qwen.gptq_format import unpack_codes
from qwen.gptq_solver import HIGHEST, LOWEST
from qwen.quantize_layout import BlockLayout, DenseCheckpoint, ReadTensor
from qwen.tunable_linear import RelativeChange, TunableLinear
from qwen.tuning_text import TuningText

#: Rows of a step, and of one pass through the model. Fewer leave a GPU waiting for its next kernel.
_BATCH_ROWS, _CPU_BATCH_ROWS = 16, 2
_MEASURED_ROWS = 8
#: Tokens whose logits are in memory at once.
_LOGIT_TOKENS, _CPU_LOGIT_TOKENS = 2048, 512
_WARM_UP, _LAST_RATE = 0.05, 0.02
#: How often the held-out text is looked at, and after how many steps at the earliest.
_LOOKS = 12
#: Biases smaller than this are tuned as if they were as large.
_SMALLEST_BIAS = 1e-2


@dataclass(frozen=True, slots=True)
class TuningOptions:
    """How a quantised model is tuned.

    Attributes:
        codes: Whether the codes are tuned too; 16 more bytes of memory a weight.
        scale_rate: Learning rate of the scales, relative to each one.
        other_rate: Likewise, of norms and biases.
        code_rate: Learning rate of the codes, in codes. On the embedded model 0.0015 was better
            than 0.004 over 800,000 tokens; 0.01 began by nearly doubling KL.
        code_margin: How far from the middle between two codes each begins at least, in codes;
            with 0.2 hardly any code changed in a million tokens.
    """

    codes: bool = False
    scale_rate: float = 1e-3
    other_rate: float = 3e-4
    code_rate: float = 1.5e-3
    code_margin: float = 0.02


@dataclass(frozen=True, slots=True)
class Tuned:
    """What became of a model.

    Attributes:
        before: KL on the held-out text, nats a token.
        after: Likewise; equal to `before` if nothing was better.
        values: Tensors by their names in the model, float32: scales (outputs, groups), codes
            (outputs, inputs) uint8, norms and biases. Empty if nothing was better.
        problem: A sentence for the user; "" if all went well.
    """

    before: float
    after: float
    values: dict[str, Tensor]
    problem: str = ""


def build_student(
    dense: DenseCheckpoint, read: ReadTensor, teacher: Any, *, device: str, dtype: torch.dtype
) -> Any:
    """Build the quantised model in a form that has gradients.

    Args:
        dense: What it was made from.
        read: Gives the quantised checkpoint's tensors, None for those that it has not.
        teacher: The dense model, of which embedding and head are used; they are the same.
        device: Where to compute.
        dtype: Of the products.
    """
    layout = dense.layout
    around = {f"{layout.embedding}.weight", f"{layout.head}.weight"}

    def read_small(name: str) -> Tensor | None:
        return None if name in around else read(name)

    student = dense.build_model(read_small, dtype=torch.float32, device=device)
    for name in (layout.embedding, layout.head):
        student.set_submodule(name, teacher.get_submodule(name))
    for path in linear_paths(dense):
        parts = {part: read(f"{path}.{part}") for part in ("qweight", "scales", "bias")}
        if _has_8_bits(parts["qweight"], teacher.get_submodule(path)):
            student.set_submodule(path, teacher.get_submodule(path))  # as good as dense
            continue
        moved = {k: None if v is None else v.to(device) for k, v in parts.items()}
        qweight, scales = moved["qweight"], moved["scales"]
        assert qweight is not None and scales is not None, "a finished layer has all its tensors"
        codes = unpack_codes(qweight).t().contiguous()
        linear = TunableLinear(codes, scales.t().contiguous(), moved["bias"], dtype=dtype)
        student.set_submodule(path, linear)
    for block in student.get_submodule(layout.layers):
        # What a block computes is not kept but computed again when gradients are.
        block.forward = partial(_recomputed, block.forward)
    return student


def _has_8_bits(qweight: Tensor | None, linear: nn.Linear) -> bool:
    return qweight is not None and len(qweight) * 4 == linear.in_features


def _recomputed(forward: Any, hidden_states: Tensor, **arguments: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(hidden_states, **arguments)
    return checkpoint(
        forward, hidden_states, use_reentrant=False, preserve_rng_state=False, **arguments
    )


def linear_paths(dense: DenseCheckpoint) -> Iterator[str]:
    """Yield the names of all quantised linear layers."""
    for index in range(dense.count):
        for name in dense.layout.linears:
            yield f"{dense.layout.layers}.{index}.{name}"


class Distillation:
    """The tuning of one model; changes the student that it is given.

    Args:
        teacher: The dense model, without gradients.
        student: From `build_student`.
        layout: Of both.
        options: How.
        read_dense: Gives the dense weights, for codes that are tuned.
    """

    def __init__(
        self,
        teacher: Any,
        student: Any,
        layout: BlockLayout,
        options: TuningOptions,
        read_dense: ReadTensor,
    ) -> None:
        self._teacher, self._student = teacher, student
        self._embedding = teacher.get_submodule(layout.embedding)
        self._head = teacher.get_submodule(layout.head)
        self._device: torch.device = self._head.weight.device
        self._rates = _release(student, options, read_dense)
        groups = [{"params": list(p.values()), "rate": rate} for rate, p in self._rates.items()]
        # Gradients of a mean over thousands of tokens are tiny; the usual epsilon would outweigh.
        fused = self._device.type == "cuda"
        self._optimizer = torch.optim.Adam(
            groups, lr=0.0, betas=(0.9, 0.95), eps=1e-12, fused=fused
        )

    def run(self, text: TuningText, report: ReportProgress) -> Tuned:
        """Read the rows once; keep the step that is best on the held-out ones.

        A step that is not finite ends the tuning with what was best before it.
        """
        size = _BATCH_ROWS if self._device.type == "cuda" else _CPU_BATCH_ROWS
        batches = torch.split(text.rows, size)
        every = max(1, math.ceil(len(batches) / _LOOKS))
        first = best = self.measure(text.held_out)
        report(f"KL to the dense model before tuning: {first:.4f}")
        kept: dict[str, Tensor] = {}
        problem = ""
        started = time.monotonic()
        for step, batch in enumerate(batches):
            if not math.isfinite(self._step(batch, step / len(batches))):
                problem = "The tuning left the range of numbers"
                break
            if (step + 1) % every and step + 1 < len(batches):
                continue
            now = self.measure(text.held_out)
            tokens = min((step + 1) * size, len(text.rows)) * text.rows.shape[1]
            rate = tokens / (time.monotonic() - started)
            report(
                f"Tuned on {tokens:,} of {text.rows.numel():,} tokens: KL {now:.4f}, before "
                f"{first:.4f}; {rate:,.0f} tokens/s"
            )
            if now < best:
                best, kept = now, self._values()
        if not kept:
            problem = problem or "The tuning made nothing better"
            problem += ", so the checkpoint stays as it was before it. Try another text."
        elif problem:
            problem += "; what was best before that is kept."
        return Tuned(first, best, kept, problem)

    @torch.no_grad()
    def measure(self, rows: Tensor) -> float:
        """Return the mean KL over all tokens, nats."""
        total = 0.0
        for batch in torch.split(rows, _MEASURED_ROWS):
            theirs, ours = self._hidden(self._teacher, batch), self._hidden(self._student, batch)
            for part, aim in zip(_parts(ours), _parts(theirs), strict=True):
                total += float(self._divergence(part, aim))
        return total / rows.numel()

    def _step(self, rows: Tensor, progress: float) -> float:
        """Change the student by one batch; return its KL before that."""
        for group in self._optimizer.param_groups:
            group["lr"] = group["rate"] * _rate_at(progress)
        with torch.no_grad():
            theirs = self._hidden(self._teacher, rows)
        ours = self._hidden(self._student, rows)
        # The logits of all tokens would not fit: each part goes back to the hidden states at once.
        reached = ours.detach()
        gradient = reached.new_empty(reached.shape)
        losses = []
        parts = zip(_parts(reached), _parts(theirs), _parts(gradient), strict=True)
        for part, aim, slot in parts:
            leaf = part.clone().requires_grad_()
            loss = self._divergence(leaf, aim) / rows.numel()
            slot.copy_(torch.autograd.grad(loss, leaf)[0])
            losses.append(loss.detach())
        total = float(torch.stack(losses).sum())  # waits for the GPU once
        if not math.isfinite(total):
            return total
        torch.autograd.backward(ours, gradient)
        parameters = [p for group in self._optimizer.param_groups for p in group["params"]]
        norm = nn.utils.clip_grad_norm_(parameters, 1.0)
        if not norm.isfinite():
            return math.nan
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return total

    def _hidden(self, model: Any, rows: Tensor) -> Tensor:
        """Return what the head reads, (rows, seq_len, hidden_size)."""
        # From float32 on, what blocks add up stays float32; only their products are shorter.
        embedded = self._embedding(rows.to(self._device)).float()
        with self._shortened():
            hidden: Tensor = model.base_model(inputs_embeds=embedded, use_cache=False)[0]
        return hidden.float()

    def _divergence(self, ours: Tensor, theirs: Tensor) -> Tensor:
        """Return the sum of KL(theirs ‖ ours) over (tokens, hidden_size)."""
        with self._shortened():
            aim, reached = self._head(theirs), self._head(ours)
        return nn.functional.kl_div(
            reached.float().log_softmax(-1),
            aim.float().log_softmax(-1),
            reduction="sum",
            log_target=True,
        )

    def _shortened(self) -> AbstractContextManager[Any]:
        enabled = self._device.type == "cuda"
        return torch.autocast(self._device.type, torch.bfloat16, enabled=enabled)

    @torch.no_grad()
    def _values(self) -> dict[str, Tensor]:
        """Return all that is tuned, as it is now, on the host."""
        values = {}
        for names in self._rates.values():
            for name in names:
                path = name.replace("parametrizations.", "").removesuffix(".original")
                owner, _, attribute = path.rpartition(".")
                value = getattr(self._student.get_submodule(owner), attribute)
                if attribute == "codes":
                    value = value.round().clamp(LOWEST, HIGHEST).to(torch.uint8)
                values[path] = value.detach().cpu().clone()
        return values


def _release(
    student: Any, options: TuningOptions, read_dense: ReadTensor
) -> dict[float, dict[str, nn.Parameter]]:
    """Give gradients to what is tuned; return the parameters by learning rate and name."""
    linears = {n: m for n, m in student.named_modules() if isinstance(m, TunableLinear)}
    inside = tuple(f"{name}." for name in linears)
    modules = dict(student.named_modules())
    for name in [name for name, _ in student.named_parameters()]:
        owner, _, attribute = name.rpartition(".")
        module = modules[owner]
        if isinstance(module, nn.Embedding | nn.Linear):
            continue  # shared with the teacher: embedding, head, layers of 8 bits
        smallest = _SMALLEST_BIAS if attribute == "bias" else 0.0
        parameter = getattr(module, attribute)
        register_parametrization(module, attribute, RelativeChange(parameter.detach(), smallest))
    if options.codes:
        for name, linear in linears.items():
            weight = read_dense(f"{name}.weight")
            assert weight is not None, "a dense checkpoint has all its weights"
            linear.release_codes(weight.to(linear.scales.device), margin=options.code_margin)
    groups: dict[float, dict[str, nn.Parameter]] = {}
    for name, parameter in student.named_parameters():
        changes = name.endswith(".original")
        if not changes and not (name.startswith(inside) and name.endswith(".codes")):
            continue
        rate = options.other_rate if changes else options.code_rate
        if ".scales." in name:
            rate = options.scale_rate
        groups.setdefault(rate, {})[name] = parameter.requires_grad_()
    return groups


def _rate_at(progress: float) -> float:
    """Return the part of the learning rate: up in a line, down in half a cosine wave."""
    rising = min(1.0, (progress + 1e-3) / _WARM_UP)
    return rising * (_LAST_RATE + (1 - _LAST_RATE) * (1 + math.cos(math.pi * progress)) / 2)


def _parts(hidden: Tensor) -> tuple[Tensor, ...]:
    tokens = _LOGIT_TOKENS if hidden.is_cuda else _CPU_LOGIT_TOKENS
    return torch.split(hidden.flatten(0, 1), tokens)
