"""A dense checkpoint, opened layer by layer: where its linear layers are, and one block at a time.

Knows the layouts of Qwen v1 and of Qwen2, Qwen3 and Llama. Of the weights only the rows of the
embedding that are wanted and one layer are in memory. A checkpoint's own code is never run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from qwen.auto import register_qwen
from qwen.checkpoint_files import load_json
from qwen.convert_map import StoredTensor
from qwen.convert_weights import read_headers
from qwen.errors import CheckpointDamaged, CheckpointUnsupported

#: What a layer is called with besides its hidden states.
LayerArguments = dict[str, Any]
ReadTensor = Callable[[str], Tensor | None]


@dataclass(frozen=True, slots=True)
class BlockLayout:
    """Names of a model's parts.

    Attributes:
        layers: Of the list of blocks, in the checkpoint and in the model.
        embedding: Of the module.
        head: Of the module; it stays dense.
        attention_norm: In a block, likewise the next three.
        query_key_value: Linear layers that read what the first norm gives.
        gate_up: Linear layers that read what the second norm gives.
    """

    layers: str
    embedding: str
    attention: str
    attention_norm: str
    mlp: str
    mlp_norm: str
    query_key_value: tuple[str, ...]
    attention_out: str
    gate_up: tuple[str, ...]
    mlp_out: str
    head: str = "lm_head"

    @property
    def linears(self) -> tuple[str, ...]:
        """All linear layers of a block, in the order in which they run."""
        return (*self.query_key_value, self.attention_out, *self.gate_up, self.mlp_out)


_QWEN1 = BlockLayout(
    layers="transformer.h",
    embedding="transformer.wte",
    attention="attn",
    attention_norm="ln_1",
    mlp="mlp",
    mlp_norm="ln_2",
    query_key_value=("attn.c_attn",),
    attention_out="attn.c_proj",
    gate_up=("mlp.w1", "mlp.w2"),
    mlp_out="mlp.c_proj",
)
_LLAMA = BlockLayout(
    layers="model.layers",
    embedding="model.embed_tokens",
    attention="self_attn",
    attention_norm="input_layernorm",
    mlp="mlp",
    mlp_norm="post_attention_layernorm",
    query_key_value=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    attention_out="self_attn.o_proj",
    gate_up=("mlp.up_proj", "mlp.gate_proj"),
    mlp_out="mlp.down_proj",
)
#: By `model_type`.
LAYOUTS: dict[str, BlockLayout] = {
    "qwen": _QWEN1,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "llama": _LLAMA,
}


class _Reached(Exception):
    """Ends a forward pass at the first block, with what that would get."""

    def __init__(self, arguments: LayerArguments) -> None:
        self.arguments = arguments


class _FirstBlock(nn.Module):
    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        raise _Reached(kwargs)


class DenseCheckpoint:
    """A checkpoint whose layers are read on demand.

    Args:
        folder: Configuration and safetensors; only read.

    Raises:
        CheckpointUnsupported: It is quantised already, or of a layout that is not known.
        CheckpointDamaged: A tensor is missing or does not fit the configuration.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.raw_config = load_json(folder / "config.json")
        self.layout = _layout_of(self.raw_config, folder)
        self.stored: Mapping[str, StoredTensor] = read_headers(folder)
        from transformers import AutoConfig

        register_qwen()
        self.config: Any = AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        _check_attention(self.config, folder)
        self.count: int = self.config.num_hidden_layers
        self._skeleton = self._build_skeleton()

    @property
    def context_length(self) -> int:
        """Tokens that the model was trained to read."""
        key = "seq_length" if self.layout is _QWEN1 else "max_position_embeddings"
        return int(getattr(self.config, key))

    @property
    def vocabulary(self) -> int:
        """Tokens that the embedding has rows for."""
        return self.shape(f"{self.layout.embedding}.weight")[0]

    @property
    def weights_count(self) -> int:
        """How many numbers the checkpoint holds."""
        return sum(math.prod(tensor.shape) for tensor in self.stored.values())

    def shape(self, name: str) -> tuple[int, int]:
        """Return the shape of a matrix; raises as `read` does."""
        outputs, inputs = self._find(name).shape
        return outputs, inputs

    def names_around(self) -> list[str]:
        """Return the names of the tensors that belong to no layer."""
        layout = self.layout
        names = [name for name in self._skeleton.state_dict() if ".0." not in name]
        if self.config.tie_word_embeddings and f"{layout.head}.weight" not in self.stored:
            names.remove(f"{layout.head}.weight")
        return names

    def layer_of(self, name: str) -> int | None:
        """Return the layer that a tensor belongs to; None if it belongs to none."""
        rest = name.removeprefix(f"{self.layout.layers}.")
        return None if rest == name else int(rest.partition(".")[0])

    def read(self, name: str) -> Tensor:
        """Read a tensor, as it is stored.

        Raises:
            CheckpointDamaged: It is not there.
        """
        path = self.folder / self._find(name).file
        with safe_open(path, framework="pt") as opened:  # unmaps what else the file holds
            tensor: Tensor = opened.get_tensor(name).clone()
        return tensor

    def _find(self, name: str) -> StoredTensor:
        found = self.stored.get(name)
        if found is None:
            raise CheckpointDamaged(
                f"The weights in {self.folder} are incomplete: the tensor {name} is not there. "
                "Fetch the safetensors files again."
            )
        return found

    def embed(self, ids: Tensor) -> Tensor:
        """Look tokens up: (rows, seq_len) int → (rows, seq_len, hidden_size) float32."""
        matrix = self.read(f"{self.layout.embedding}.weight")
        if int(ids.max()) >= len(matrix):
            raise CheckpointDamaged(
                f"The tokenizer in {self.folder} knows tokens that the model does not. Fetch both "
                "from the same checkpoint."
            )
        return matrix[ids].float()

    def arguments(self, hidden_states: Tensor) -> LayerArguments:
        """Find what blocks get besides hidden states: positions, and a mask if there is one.

        Args:
            hidden_states: (1, seq_len, hidden_size) float, on the device of the work.
        """
        body = self._skeleton.base_model
        try:
            body(inputs_embeds=hidden_states, use_cache=False)
        except _Reached as reached:
            return reached.arguments
        raise AssertionError("a model that has blocks runs the first of them")

    def layer_names(self, index: int) -> list[str]:
        """Return the names of a layer's tensors that the model has, without those computed."""
        prefix = f"{self.layout.layers}.{index}."
        return [prefix + name for name in self._block.state_dict()]

    def load_layer(self, index: int, *, device: str) -> nn.Module:
        """Return a block with the weights of a layer, float32; the same object every time."""
        prefix = f"{self.layout.layers}.{index}."
        weights = {}
        for name, parameter in self._block.state_dict().items():
            weight = self.read(prefix + name)
            if weight.shape != parameter.shape:
                raise CheckpointDamaged(
                    f"The tensor {prefix + name} has the shape {tuple(weight.shape)}, but "
                    f"config.json asks for {tuple(parameter.shape)}. Fetch both from the same "
                    "checkpoint."
                )
            if not weight.isfinite().all():
                raise CheckpointDamaged(
                    f"The tensor {prefix + name} holds values that are no numbers. Fetch the "
                    "safetensors files again."
                )
            weights[name] = weight.to(device).float()
        self._block.load_state_dict(weights, assign=True)
        return self._block

    def load_end(self, *, device: str) -> tuple[nn.Module, Tensor]:
        """Return the last norm, float32, and the output matrix as it is stored."""
        layout = self.layout
        head, embedding = f"{layout.head}.weight", f"{layout.embedding}.weight"
        (name,) = (name for name in self.names_around() if name not in (head, embedding))
        norm = self._skeleton.get_submodule(name.removesuffix(".weight"))
        norm.load_state_dict({"weight": self.read(name).to(device).float()}, assign=True)
        stored = head if head in self.stored else embedding
        return norm.requires_grad_(False), self.read(stored).to(device)

    def build_model(self, read: ReadTensor, *, dtype: torch.dtype, device: str) -> Any:
        """Build the whole model.

        Args:
            read: Gives a tensor by its name in the checkpoint; None is left without weights.
            dtype: Of all weights.
            device: Where they go.
        """
        model = _build_empty(self.config)
        if hasattr(model.base_model, "rotary_emb"):
            model.base_model.rotary_emb.to(device)
        names = [*self.names_around()]
        for index in range(self.count):
            names += self.layer_names(index)
        found = {name: read(name) for name in names}
        weights = {
            name: tensor.to(device=device, dtype=dtype)
            for name, tensor in found.items()
            if tensor is not None
        }
        model.load_state_dict(weights, strict=False, assign=True)
        if f"{self.layout.head}.weight" not in names:  # tied
            head, embedding = (
                model.get_submodule(name) for name in (self.layout.head, self.layout.embedding)
            )
            head.weight = embedding.weight
        return model.requires_grad_(False)

    def _build_skeleton(self) -> Any:
        """Build the model with one block and no weights; only what is computed is real."""
        config = type(self.config).from_dict(self.config.to_dict())
        config.num_hidden_layers = 1
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:1]
        model = _build_empty(config)
        blocks = model.get_submodule(self.layout.layers)
        self._block: nn.Module = blocks[0]
        blocks[0] = _FirstBlock()
        return model


def _build_empty(config: Any) -> Any:
    """Build a model without weights; only what is computed is real."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        auto: Any = AutoModelForCausalLM
        model: Any = auto.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    model.eval()
    body = model.base_model
    if hasattr(body, "rotary_emb"):  # its frequencies are computed, not stored
        body.rotary_emb = type(body.rotary_emb)(config=config)
    return model


def _layout_of(config: Mapping[str, Any], folder: Path) -> BlockLayout:
    if config.get("quantization_config") or (folder / "quantize_config.json").exists():
        raise CheckpointUnsupported(
            f"{folder} is quantised already. Name the unquantised checkpoint that it was made from."
        )
    kind = config.get("model_type")
    layout = LAYOUTS.get(kind) if isinstance(kind, str) else None
    if layout is None:
        raise CheckpointUnsupported(
            f"{folder} cannot be quantised: its model_type is '{kind}'. Choose a checkpoint of "
            "the kind " + ", ".join(LAYOUTS) + "."
        )
    return layout


def _check_attention(config: Any, folder: Path) -> None:
    if set(getattr(config, "layer_types", None) or ()) - {"full_attention"}:
        raise CheckpointUnsupported(
            f"{folder} cannot be quantised: some of its layers attend through a sliding window "
            "(layer_types). Choose a checkpoint whose layers are all alike."
        )
