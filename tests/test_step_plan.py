"""What a step of the decode loop reads."""

from types import SimpleNamespace

import pytest

from qwen.step_plan import Running, plan_step


def running(*unread):
    return [
        Running(SimpleNamespace(), SimpleNamespace(num_unread=count), quantum=64)
        for count in unread
    ]


def sizes(requests, **options):
    replies, prompts = plan_step(
        requests, **{"chunk": 64, "budget": 64, "is_exact": True} | options
    )
    return [(requests.index(each), size) for each, size in replies], [
        (requests.index(each), size) for each, size in prompts
    ]


def test_replies_come_first_and_prompts_share_what_may_be_read_beside_them():
    assert sizes(running(30, 1, 50, 1)) == ([(1, 1), (3, 1)], [(0, 30), (2, 34)])


def test_long_prompt_is_read_in_chunks():
    assert sizes(running(200)) == ([], [(0, 64)])


def test_what_was_read_ahead_keeps_no_prompt_from_being_read():
    assert sizes(running(0, 40)) == ([], [(1, 40)])


@pytest.mark.parametrize(("is_exact", "expected"), [(True, [(0, 30), (1, 34)]), (False, [(0, 30)])])
def test_only_exact_forms_are_cut_beside_another_prompt(is_exact, expected):
    assert sizes(running(30, 50), is_exact=is_exact) == ([], expected)
