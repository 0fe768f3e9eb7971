"""The golden data of the published Qwen v1 code: cases, tensors and the tiny checkpoint."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file

from qwen import AutoModelForCausalLM

GOLDEN = Path(__file__).parent / "data" / "golden"
CHECKPOINT = GOLDEN / "tiny_qwen"
CASES = json.loads((GOLDEN / "cases.json").read_text())
PAD, EOS, SEQ_LENGTH = 1023, 1022, 64


@cache
def tensors():
    return load_file(GOLDEN / "logits.safetensors")


def golden_ids(start, end):
    """One row of the token ids that every case slices, (1, end - start)."""
    return tensors()["ids"][start:end].long()[None]


def columns():
    return tensors()["cols"].long()


def load_tiny(**kwargs):
    return AutoModelForCausalLM.from_pretrained(CHECKPOINT, trust_remote_code=True, **kwargs)


def assert_parity(actual, expected):
    """Compare with the tolerance for float32 of the golden data."""
    torch.testing.assert_close(actual, expected.float(), atol=2e-4, rtol=1e-4)


def left_padded(case):
    """The batch of a left-padded golden case: ids and mask, both (batch, longest)."""
    spans = zip(case["starts"], case["lengths"], strict=True)
    return pad_left([golden_ids(start, start + n)[0] for start, n in spans])


def pad_left(rows):
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), PAD)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :] = row
        mask[i, width - len(row) :] = 1
    return ids, mask
