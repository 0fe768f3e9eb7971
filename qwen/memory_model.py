"""How much memory a model takes: a small table of named rows, from sizes alone.

Plain arithmetic on a `ModelShape`; knows no file, no machine and no torch. Each constant says how
it was measured; `docs/preflight.md` compares the sums with what the system reports.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

Dtype = Literal["bfloat16", "float16", "float32"]
KvCache = Literal["auto", "int8"]
Kind = Literal["weights", "cache", "activations", "program", "file"]

DTYPE_BYTES: Mapping[str, int] = {"bfloat16": 2, "float16": 2, "float32": 4}

#: Contexts are told in whole multiples of this many tokens.
CONTEXT_STEP = 256

#: Resident bytes of Python, torch 2.13 (CPU) and Transformers 5.23 with a model's classes imported;
#: those of a fast tokenizer for each token of its vocabulary (145 MB of 152k).
PROGRAM_BYTES = 360_000_000
_TOKENIZER_BYTES = 950

#: On a GPU beside weights, cache and activations: cuBLAS's workspace and what the allocator holds
#: in part-used blocks. An allowance, not a measurement.
_CUDA_BYTES = 400_000_000

#: The system maps so many bytes of a file around each one that is read (fault-around, Linux).
_MAPPED_AT_ONCE = 65_536

#: Copies of one row of logits in float32 while a token is chosen: scores, probabilities, their sum,
#: sorted values with ids of 8 bytes.
_SAMPLING_COPIES = 6
#: Where weights are packed (`qwen/kernels`): bits of each, and inputs that share a scale of two
#: bytes.
_PACKED_BITS, _PACKED_GROUP = 6, 32
#: The models that `qwen.decoder` runs.
_PACKED_TYPES = ("qwen", "qwen2")

#: Copies of a chunk's states: residual, norm in float32 (twice), queries, output.
_STATE_COPIES = 8


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What of a model decides how much memory it takes.

    Attributes:
        context_length: Tokens of prompt and reply that the model is good for.
        embedding: Parameters of the input embedding.
        head: Parameters of the output matrix; 0 where it is the embedding itself.
        linear: Parameters of the layers' matrices, which are what GPTQ packs.
        other: All remaining parameters: norms, biases, experts.
        stored_dtype: In which the file holds all weights; None if unknown or mixed.
        stored_bytes: Of the weights' files; 0 if unknown.
        model_type: As in config.json; empty if unknown.
        bits: Of a packed weight; 0 where nothing is packed.
        group_size: Packed weights that share a scale.
        caches_int8: Whether the checkpoint asks for a cache in int8.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    context_length: int
    embedding: int
    head: int
    linear: int
    other: int
    stored_dtype: str | None = None
    stored_bytes: int = 0
    model_type: str = ""
    bits: int = 0
    group_size: int = 128
    caches_int8: bool = False

    @property
    def parameters(self) -> int:
        """All parameters, each counted once."""
        return self.embedding + self.head + self.linear + self.other

    @property
    def joined(self) -> int:
        """Parameters of the projections that `qwen.decoder_weights` copies side by side."""
        gate_up = 2 * self.intermediate_size
        qkv = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        outputs = {"qwen": gate_up, "qwen2": gate_up + qkv}.get(self.model_type, 0)
        return self.num_layers * self.hidden_size * outputs


@dataclass(frozen=True, slots=True)
class MemoryItem:
    """One row of the table.

    Attributes:
        name: Fit to show.
        size: Bytes.
        kind: The sum that it belongs to; "file" is memory that the system takes back at need.
        phase: When it is there; what is needed is the larger sum of the two phases.
    """

    name: str
    size: int
    kind: Kind
    phase: Literal["always", "loading", "running"] = "always"


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """What a model takes; a further form of the weights is a further row."""

    rows: tuple[MemoryItem, ...]

    @property
    def needed(self) -> int:
        """Bytes that must be free, at the worst moment."""
        return self._largest(lambda row: row.kind != "file")

    @property
    def resident(self) -> int:
        """Bytes that the system will report as the process's peak, file pages included."""
        return self._largest(lambda row: True)

    def of_kind(self, *kinds: Kind) -> int:
        """Sum the rows of some kinds."""
        return sum(row.size for row in self.rows if row.kind in kinds)

    def _largest(self, counts: Callable[[MemoryItem], bool]) -> int:
        phases = ("loading", "running")
        return max(
            sum(row.size for row in self.rows if counts(row) and row.phase in ("always", phase))
            for phase in phases
        )


def estimate_memory(
    shape: ModelShape,
    *,
    context: int,
    dtype: Dtype,
    chunk: int,
    kv_cache: KvCache = "auto",
    packs: bool = False,
    on_gpu: bool = False,
    program: int = PROGRAM_BYTES,
    further: tuple[MemoryItem, ...] = (),
) -> MemoryEstimate:
    """Add up what a model takes while it answers one request.

    Args:
        shape: Of the model.
        context: Tokens of prompt and reply.
        dtype: Of weights and computation.
        chunk: Tokens of a prompt that are read at once.
        kv_cache: "int8" keeps keys and values so; "auto" as the model computes.
        packs: Weights of this dtype are read and packed into 6 bits, as on a CPU by default.
        on_gpu: Then the program's own memory is another one and is not counted.
        program: Bytes of the program without a model.
        further: Rows for whatever else the way of computing keeps.
    """
    width = DTYPE_BYTES[dtype]
    in_int8 = kv_cache == "int8" or shape.caches_int8
    mapped = not on_gpu and shape.stored_dtype == dtype
    chunk = min(chunk, context)
    packs = packs and not shape.bits and shape.model_type in _PACKED_TYPES
    weigh = _packed_weights if packs else _weights
    weights = weigh(shape, width, context, mapped=mapped)
    if packs and not in_int8:
        working = _packed_activations(shape, context, chunk)
    else:
        working = _activations(shape, width, context, chunk)
    rows = [*weights, *_cache(shape, width, context, in_int8=in_int8), *working, *further]
    if on_gpu:
        rows.append(MemoryItem("CUDA libraries", _CUDA_BYTES, "program"))
    else:
        tokenizer = _TOKENIZER_BYTES * shape.vocab_size
        rows += [
            MemoryItem("program", program, "program"),
            MemoryItem("tokenizer", tokenizer, "program"),
        ]
    return MemoryEstimate(tuple(row for row in rows if row.size))


def _weights(shape: ModelShape, width: int, context: int, *, mapped: bool) -> list[MemoryItem]:
    embedding = shape.embedding * width
    if shape.bits == 4:
        # A nibble each, and for every group a scale and a zero of two bytes.
        layers = shape.linear // 2 + shape.linear // shape.group_size * 4 + shape.other * width
        name = f"layers (int4, groups of {shape.group_size})"
    else:
        layers = (shape.linear + shape.other) * width
        name = "layers"
    rows = [
        MemoryItem(f"weights: {name}", layers, "weights"),
        MemoryItem("weights: output matrix", shape.head * width, "weights"),
    ]
    if not mapped or shape.bits:
        rows.append(MemoryItem("weights: embedding", embedding, "weights"))
        if shape.stored_bytes:
            rows.append(MemoryItem("file being read", shape.stored_bytes, "file", phase="loading"))
        return rows
    # Safetensors of the wanted dtype are mapped, never copied. Of an embedding that is not the
    # output matrix too, only the rows of tokens that occur are ever read.
    read = embedding
    if shape.head:
        read = min(embedding, context * (shape.hidden_size * width + _MAPPED_AT_ONCE))
    rows.append(MemoryItem("weights: embedding, as far as it is read", read, "weights"))
    rows.append(MemoryItem("file of projections that were joined", shape.joined * width, "file"))
    return rows


def _packed_weights(
    shape: ModelShape, width: int, context: int, *, mapped: bool
) -> list[MemoryItem]:
    """Weights in 6 bits; dense ones pass through, layer by layer where they are mapped."""
    matrices = shape.linear + (shape.head or shape.embedding)
    packed = matrices * _PACKED_BITS // 8 + matrices // _PACKED_GROUP * 2 + shape.other * 4
    dense = 0 if mapped else (shape.linear + shape.head + shape.other) * width
    embedding = shape.embedding * width
    if mapped and shape.head:
        embedding = min(embedding, context * (shape.hidden_size * width + _MAPPED_AT_ONCE))
    return [
        MemoryItem("weights: packed into 6 bits", packed, "weights"),
        MemoryItem("weights: embedding, as far as it is read", embedding, "weights"),
        MemoryItem("weights: dense ones while they are packed", dense, "weights", "loading"),
        # Its pages are given back once it is packed, and it is the largest.
        MemoryItem("file of the output matrix", shape.head * width, "file", "loading"),
    ]


def _packed_activations(shape: ModelShape, context: int, chunk: int) -> list[MemoryItem]:
    states = 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * 2
    qkv = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim
    row = 3 * shape.intermediate_size + qkv + _STATE_COPIES * shape.hidden_size
    return [
        # A longer sequence takes twice the room and is copied there.
        MemoryItem("cache while it grows", states * context // 2, "activations", "running"),
        MemoryItem(
            f"activations: {chunk} tokens of the prompt", chunk * row * 4, "activations", "running"
        ),
        MemoryItem(
            "activations: choosing a token",
            shape.vocab_size * 4 * (1 + _SAMPLING_COPIES),
            "activations",
            "running",
        ),
    ]


def _cache(shape: ModelShape, width: int, context: int, *, in_int8: bool) -> list[MemoryItem]:
    states = 2 * shape.num_layers * shape.num_kv_heads * context
    if in_int8:  # a byte each, and a scale of two bytes for each token and head
        size = states * (shape.head_dim + 2)
        return [MemoryItem(f"cache: {context:,} tokens in int8", size, "cache")]
    size = states * shape.head_dim * width
    return [MemoryItem(f"cache: {context:,} tokens", size, "cache")]


def _activations(shape: ModelShape, width: int, context: int, chunk: int) -> list[MemoryItem]:
    one_layer = 2 * context * shape.head_dim * width
    # A layer's keys and values are copied to make them longer, or from int8 to compute with them,
    # and once more where several heads share them.
    attention = one_layer * shape.num_kv_heads
    if shape.num_heads != shape.num_kv_heads:
        attention += one_layer * shape.num_heads
    attention += chunk * context * (1 + width)  # the mask, as truth values and as numbers
    mlp = chunk * (3 * shape.intermediate_size * width + _STATE_COPIES * shape.hidden_size * width)
    sampling = shape.vocab_size * (width + 4 * _SAMPLING_COPIES)
    unpacked = 0
    if shape.bits == 4:  # prompts are multiplied by dense weights, of one matrix at a time
        widest = max(
            shape.intermediate_size, (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim
        )
        unpacked = shape.hidden_size * widest * (2 * width + 1)
    return [
        MemoryItem("activations: one matrix unpacked", unpacked, "activations", "running"),
        MemoryItem("activations: attention of one layer", attention, "activations", "running"),
        MemoryItem(f"activations: {chunk} tokens of the prompt", mlp, "activations", "running"),
        MemoryItem("activations: choosing a token", sampling, "activations", "running"),
    ]


def largest_context(fits: Callable[[int], bool], *, limit: int) -> int:
    """Find the longest context that fits, in whole steps of `CONTEXT_STEP` or the limit itself.

    Args:
        fits: Tells of a number of tokens whether they fit; if they do, fewer do too.
        limit: The longest that is wanted.

    Returns:
        Tokens; 0 when not even one step fits.
    """
    if fits(limit):
        return limit
    low, high = 0, -(-limit // CONTEXT_STEP)  # in steps: low fits or is 0, high does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle * CONTEXT_STEP) else (low, middle)
    return low * CONTEXT_STEP
