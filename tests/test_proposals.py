"""Tokens of many replies, chosen at once on their way to the host."""

import pytest
import torch

from qwen import proposals
from qwen.errors import BackendFailed, OutOfMemory
from qwen.messages import SamplingParams
from qwen.proposals import Proposals, propose
from qwen.sampling import Sampler, propose_rows


def rows(count=6):
    """Return owners, samplers of three kinds, and logits."""
    generator = torch.Generator().manual_seed(0)
    kinds = [
        {"temperature": 0},
        {"temperature": 0.8, "top_k": 5},
        {"temperature": 0, "repetition_penalty": 1.3, "top_logprobs": 2},
    ]
    return [
        (
            f"reply {i}",
            Sampler(SamplingParams(**kinds[i % 3], seed=i), [1, 2, i], device=torch.device("cpu")),
            torch.randn(50, generator=generator),
        )
        for i in range(count)
    ]


def chosen(groups):
    return dict(Proposals(groups))


def test_likes_are_chosen_at_once_as_each_by_itself():
    at_once, no_failures = propose(rows(), by_kind=True)
    alone, _ = propose(rows(), by_kind=False)
    assert no_failures == []
    assert [len(owners) for owners, _ in at_once] == [2, 2, 2]
    assert [len(owners) for owners, _ in alone] == [1] * 6
    assert chosen(at_once) == chosen(alone)
    assert list(chosen(alone)) == [f"reply {i}" for i in range(6)]


def test_tokens_on_the_device_are_those_that_samplers_accept():
    given = rows()
    groups, _ = propose(given, by_kind=True)
    proposals_of_all = Proposals(groups)
    samplers = {owner: sampler for owner, sampler, _ in given}
    accepted = [samplers[owner].accept(values).token_id for owner, values in proposals_of_all]
    assert proposals_of_all.tokens().tolist() == accepted
    assert proposals_of_all.tokens().dtype == torch.int64


@pytest.mark.parametrize(
    ("error", "named"),
    [(torch.OutOfMemoryError("out of memory"), OutOfMemory), (ValueError("bad"), BackendFailed)],
)
def test_fault_of_one_leaves_its_likes_their_tokens(monkeypatch, error, named):
    def fail(samplers, logits):
        chosen = propose_rows(samplers, logits)  # has drawn for all of them
        if any(logits[:, 0] == 1234):
            raise error
        return chosen

    expected, _ = propose(rows(), by_kind=True)
    given = rows()
    given[1][2][0] = 1234
    monkeypatch.setattr(proposals, "propose_rows", fail)
    groups, failures = propose(given, by_kind=True)
    ((owner, reason),) = failures
    assert owner == "reply 1" and type(reason) is named
    others = chosen(expected)
    del others["reply 1"]
    assert chosen(groups) == others
