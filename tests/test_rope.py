"""Dynamic NTK, rotary tables and log-n as pure functions, against the published tables."""

from __future__ import annotations

import math

import pytest
import torch
from golden_v1 import CASES, SEQ_LENGTH, tensors

from qwen.configuration_qwen import QWenConfig
from qwen.rope import apply_rotary, logn_factor, ntk_alpha, rotary_tables, scaled_inv_freq

TABLES = [(16, 1), (70, 3), (130, 7), (260, 15)]


def test_alpha_follows_the_published_table():
    table = CASES["ntk_alpha_table"]["table"]
    lengths = torch.tensor([int(n) for n in table])
    assert ntk_alpha(lengths, SEQ_LENGTH).tolist() == list(table.values())


@pytest.mark.parametrize("seq_length", [3, 2048, 8192, 32768])
def test_alpha_changes_exactly_one_token_past_each_doubling(seq_length):
    for doublings in range(8):
        edge = seq_length * 2**doublings
        below, above = ntk_alpha(torch.tensor([edge, edge + 1]), seq_length).tolist()
        assert (below, above) == (2 ** (doublings + 1) - 1, 2 ** (doublings + 2) - 1)


def test_configuration_tells_the_same_alpha_as_the_tensors():
    config = QWenConfig(seq_length=64)
    lengths = list(range(1, 600))
    assert [config.ntk_alpha(n) for n in lengths] == ntk_alpha(torch.tensor(lengths), 64).tolist()
    assert QWenConfig(seq_length=64, use_dynamic_ntk=False).ntk_alpha(100) == 1


@pytest.mark.parametrize(("length", "alpha"), TABLES)
def test_rotary_tables_are_the_published_ones(length, alpha):
    inv_freq = scaled_inv_freq(torch.tensor([alpha]), dim=16, base=10000)
    assert torch.equal(inv_freq[0], tensors()[f"rotary.inv_freq.alpha{alpha}"])
    cos, sin = rotary_tables(torch.arange(length)[None], inv_freq)
    assert torch.equal(cos[0], tensors()[f"rotary.cos.L{length}.alpha{alpha}"])
    assert torch.equal(sin[0], tensors()[f"rotary.sin.L{length}.alpha{alpha}"])


def test_each_sequence_has_its_own_frequencies():
    both = scaled_inv_freq(torch.tensor([1.0, 7.0]), dim=16, base=10000)
    for row, alpha in zip(both, (1.0, 7.0), strict=True):
        assert torch.equal(row, scaled_inv_freq(torch.tensor([alpha]), dim=16, base=10000)[0])


def test_logn_is_the_published_table():
    torch.testing.assert_close(
        logn_factor(torch.arange(300), SEQ_LENGTH), tensors()["logn.first300"]
    )


def test_logn_goes_on_where_the_published_table_ends():
    factor = logn_factor(torch.tensor([32766, 32767, 100_000]), 8192)
    expected = [math.log(p + 1) / math.log(8192) for p in (32766, 32767, 100_000)]
    assert factor.tolist() == pytest.approx(expected, rel=1e-6)


def test_rotation_keeps_lengths_and_depends_on_distance_only():
    torch.manual_seed(0)
    query, key = torch.randn(2, 1, 1, 1, 16)
    inv_freq = scaled_inv_freq(torch.ones(1), dim=16, base=10000)

    def score(at_query, at_key):
        turned = [
            apply_rotary(x, *rotary_tables(torch.tensor([[at]]), inv_freq))
            for x, at in ((query, at_query), (key, at_key))
        ]
        assert turned[0].norm().item() == pytest.approx(query.norm().item(), rel=1e-5)
        return (turned[0] * turned[1]).sum().item()

    assert score(7, 2) == pytest.approx(score(105, 100), abs=1e-4)
    assert score(7, 2) != pytest.approx(score(2, 7), abs=1e-2)


def test_only_the_rotary_part_of_a_head_is_turned():
    x = torch.randn(1, 2, 3, 16)
    tables = rotary_tables(torch.arange(1, 4)[None], torch.ones(1, 4))
    turned = apply_rotary(x, *tables)
    assert torch.equal(turned[..., 8:], x[..., 8:])
    assert not torch.isclose(turned[..., :8], x[..., :8]).all(-1).any()


def test_low_precision_is_rotated_in_float32():
    tables = rotary_tables(torch.tensor([[4097]]), torch.tensor([[1.0, 0.5]]))
    assert tables[0].dtype == torch.float32
    turned = apply_rotary(torch.ones(1, 1, 1, 4, dtype=torch.bfloat16), *tables)
    assert turned.dtype == torch.float32
    assert turned[0, 0, 0, 0].item() == pytest.approx(math.cos(4097) - math.sin(4097), abs=1e-3)
