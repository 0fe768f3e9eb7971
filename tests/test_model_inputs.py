"""Which hidden states become logits."""

import pytest
import torch

from qwen.model_inputs import kept_positions

HIDDEN = torch.arange(2 * 4 * 3).reshape(2, 4, 3)


@pytest.mark.parametrize(
    ("logits_to_keep", "expected"),
    [
        (0, HIDDEN),
        (1, HIDDEN[:, 3:]),
        (3, HIDDEN[:, 1:]),
        (torch.tensor([2, 0]), HIDDEN[:, [2, 0]]),
        (torch.tensor([[0], [3]]), torch.stack([HIDDEN[0, [0]], HIDDEN[1, [3]]])),
        (torch.tensor([[1, 0, 0, 0], [0, 1, 1, 0]]).bool(), HIDDEN[[0, 1, 1], [0, 1, 2]]),
    ],
)
def test_positions_are_kept_by_number_by_index_by_row_or_by_mask(logits_to_keep, expected):
    assert torch.equal(kept_positions(HIDDEN, logits_to_keep), expected)
