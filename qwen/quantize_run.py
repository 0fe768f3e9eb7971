"""The layers of one quantisation, from the first that is not done to the last.

Holds one layer in memory at a time. Knows no folders but the one that it is given to work in.
"""

from __future__ import annotations

import time
from typing import Literal

import torch
from torch import Tensor

from qwen.backend import ReportProgress
from qwen.calibration import Calibration
from qwen.errors import (
    CheckpointDamaged,
    CheckpointUnsupported,
    InvalidSetting,
    OutOfMemory,
    is_out_of_memory,
)
from qwen.gptq_format import GptqConfig, pack_codes, pack_zeros
from qwen.gptq_solver import SolverOptions
from qwen.quantize_files import WorkFolder
from qwen.quantize_layers import QuantizedLayer, quantize_layer, round_layer
from qwen.quantize_layout import DenseCheckpoint
from qwen.quantize_options import GROUP_SIZES, QuantizeOptions
from qwen.sensitivity import Part, choose_parts, measure_parts

DeviceChoice = Literal["auto", "cpu"]

#: Bytes beside the weights: the tokenizer's files, generously.
_EXTRA_BYTES = 32 * 10**6


def linear_shapes(dense: DenseCheckpoint, group_size: int) -> dict[str, tuple[int, int]]:
    """Return outputs and inputs of all linear layers to quantise, by their names.

    Raises:
        InvalidSetting: The group size does not divide the inputs of one.
        CheckpointUnsupported: One cannot be packed.
    """
    shapes = {}
    for index in range(dense.count):
        for linear in dense.layout.linears:
            name = f"{dense.layout.layers}.{index}.{linear}"
            outputs, inputs = dense.shape(f"{name}.weight")
            if inputs % group_size:
                fitting = [str(size) for size in GROUP_SIZES if inputs % size == 0]
                raise InvalidSetting(
                    f"{name} reads {inputs:,} inputs, which groups of {group_size} do not divide. "
                    + (
                        f"Choose --group-size {' or '.join(fitting)}."
                        if fitting
                        else "No group size fits; this checkpoint cannot be quantised."
                    )
                )
            if outputs % 8:
                raise CheckpointUnsupported(
                    f"{name} has {outputs:,} outputs, which 8 codes in a word do not divide. This "
                    "checkpoint cannot be quantised."
                )
            shapes[name] = outputs, inputs
    return shapes


def bytes_needed(dense: DenseCheckpoint, options: QuantizeOptions) -> int:
    """Return what is on the disk at most: the parts, the target made from them, hidden states."""
    shapes = linear_shapes(dense, options.group_size)
    linear = sum(outputs * inputs for outputs, inputs in shapes.values())
    # 4 bits a weight, 16 of scale and 4 of zero a group, and 32 bits an input for g_idx.
    packed = linear // 2 + linear // options.group_size * 5 // 2
    packed += sum(4 * inputs + 2 * outputs for outputs, inputs in shapes.values())
    others = 2 * (dense.weights_count - linear)
    tokens = 0 if options.rtn else options.samples * options.sequence_length
    hidden = 2 * 4 * tokens * dense.config.hidden_size
    if not options.rtn and options.max_loss is not None:
        packed += linear // 2  # should all layers get 8 bits
    tuned = 0
    if options.tune_tokens or (options.tune_tokens is None and not options.rtn):
        tuned = linear // options.group_size * 2 + others // 8
        tuned += linear // 2 if options.tune_codes else 0
    return int(2 * (packed + others) + hidden + tuned + _EXTRA_BYTES)


class QuantizationRun:
    """One run over the layers, from the first that is not done."""

    def __init__(
        self,
        dense: DenseCheckpoint,
        options: QuantizeOptions,
        calibration: Calibration | None,
        work: WorkFolder,
        report: ReportProgress,
        *,
        device: DeviceChoice,
    ) -> None:
        self._dense = dense
        self._options = options
        self._calibration = calibration
        self._work = work
        self._report = report
        self._device = _choose_device(device)
        self.in_8_bits: list[Part] = []

    @property
    def device(self) -> str:
        """Where it computes: "cuda:0" or "cpu"."""
        return self._device

    def quantize_layers(self) -> None:
        """Quantise and write what is not done yet."""
        if self._work.starts_anew:
            self._report("The source or an option is another than before: starting anew")
        first = self._work.layers_done()
        if first:
            self._report(f"Going on after {first} of {self._dense.count} layers")
        try:
            self._choose_bits()
            with torch.inference_mode():
                hidden = self._hidden_before(first)
                for index in range(first, self._dense.count):
                    self._quantize_layer(index, hidden)
                self._write_rest()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise OutOfMemory(_memory_advice(self._device)) from error

    def _choose_bits(self) -> None:
        """Find the parts that get 8 bits, or take those that an earlier run has found."""
        max_loss = self._options.max_loss
        if self._calibration is None or max_loss is None:
            return
        kept = self._work.read_note()
        if kept is None:
            self._report("Looking which layers need 8 bits")
            parts = measure_parts(
                self._dense,
                self._calibration.ids,
                group_size=self._options.group_size,
                device=self._device,
                report=self._report,
            )
            chosen = choose_parts(parts, max_loss=max_loss)
            kept = [[part.layer, list(part.names)] for part in chosen]
            self._work.write_note(kept)
            total, size = sum(part.loss for part in parts), sum(part.size for part in parts)
            self._report(
                f"Rounded to 4 bits, the layers would cost about {total:.3f} nats a token; "
                f"{sum(part.size for part in chosen) / size:.0%} of their weights get 8 bits"
            )
        self.in_8_bits = [Part(layer, tuple(names)) for layer, names in kept]

    def _hidden_before(self, layer: int) -> Tensor | None:
        if self._calibration is None or layer == self._dense.count:
            return None
        if layer:
            hidden = self._work.read_hidden(layer=layer)
            assert hidden is not None, "hidden states are written before the layer they follow"
            return hidden
        self._report("Reading the calibration text")
        return self._dense.embed(self._calibration.ids)

    def _quantize_layer(self, index: int, hidden: Tensor | None) -> None:
        dense, options = self._dense, self._options
        started = time.monotonic()
        self._report("Quantising", done=index, total=dense.count, unit="layers")
        block = dense.load_layer(index, device=self._device)
        if hidden is None:
            layer = round_layer(block, dense.layout, group_size=options.group_size)
        else:
            arguments = dense.arguments(hidden[:1].to(self._device))
            solver = SolverOptions(options.group_size, options.damp_percent, options.rounds)
            eight = {n for part in self.in_8_bits if part.layer == index for n in part.names}
            layer = quantize_layer(
                block, dense.layout, hidden, arguments, options=solver, in_8_bits=eight
            )
            self._work.write_hidden(hidden, layer=index + 1)
        self._work.write_layer(index, self._stored(index, layer))
        self._work.forget_hidden(layer=index)
        seconds = time.monotonic() - started
        errors = "".join(
            f", {name.rsplit('.', 1)[-1]} {error:.2%}" for name, error in layer.errors.items()
        )
        self._report(f"Layer {index + 1} of {dense.count}: {seconds:.0f} s{errors}")

    def _stored(self, index: int, layer: QuantizedLayer) -> dict[str, Tensor]:
        """Return the tensors of a layer, packed or, where they stay dense, in their dtype."""
        prefix = f"{self._dense.layout.layers}.{index}."
        packed = {f"{name}.weight" for name in layer.weights}
        tensors = {}
        for name in self._dense.layer_names(index):
            short = name.removeprefix(prefix)
            if short not in packed:
                changed = layer.biases.get(short.removesuffix(".bias"))
                tensors[name] = self._dense_tensor(name, changed)
        for name, weight in layer.weights.items():
            if not weight.scales.isfinite().all():
                raise CheckpointUnsupported(
                    f"{prefix}{name} has weights that are too large for the scales of a GPTQ "
                    "checkpoint (float16). This checkpoint cannot be quantised."
                )
            outputs, inputs = weight.codes.shape
            bits = weight.bits
            config = GptqConfig(bits=bits, group_size=weight.group_size)
            zeros = torch.full((config.groups(inputs), outputs), weight.zero)
            tensors[f"{prefix}{name}.qweight"] = pack_codes(weight.codes.t().cpu(), bits=bits)
            tensors[f"{prefix}{name}.qzeros"] = pack_zeros(zeros, bits=bits)
            tensors[f"{prefix}{name}.scales"] = weight.scales.t().cpu()
            tensors[f"{prefix}{name}.g_idx"] = config.group_index(inputs)
        return tensors

    def _dense_tensor(self, name: str, value: Tensor | None = None) -> Tensor:
        """Return a tensor that stays dense, by default the source's, in the target's dtype."""
        stored = self._dense.read(name) if value is None else value.cpu()
        tensor = stored.to(getattr(torch, self._options.dtype))
        if not tensor.isfinite().all():
            raise CheckpointDamaged(
                f"The tensor {name} holds values that {self._options.dtype} cannot. If the source "
                "is sound, choose --dtype bfloat16."
            )
        return tensor

    def _write_rest(self) -> None:
        """Write embedding, head and what else belongs to no layer."""
        names = self._dense.names_around()
        self._work.write_rest({name: self._dense_tensor(name) for name in names})


def _choose_device(choice: DeviceChoice) -> str:
    return "cuda:0" if choice == "auto" and torch.cuda.is_available() else "cpu"


def _memory_advice(device: str) -> str:
    if device != "cpu":
        return (
            "The GPU's memory does not hold a layer and its calibration. Choose --device cpu, "
            "a shorter --sequence-length or --max-loss off."
        )
    return (
        "There is not enough memory for a layer and its calibration. Close other programs, or "
        "choose fewer --samples or --max-loss off."
    )
