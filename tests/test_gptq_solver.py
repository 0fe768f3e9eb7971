"""The solver: less error than rounding, only values that the format holds, odd inputs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen.gptq_solver import (
    QuantizedWeight,
    SolverOptions,
    output_error,
    round_to_nearest,
    solve,
)

GROUP = 32


def random_case(*, outputs=48, inputs=128, seed=0):
    """Weights, and inputs that go together as those of a real layer do."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, generator=generator)
    mixing = torch.randn(inputs, inputs, generator=generator) / inputs**0.5
    sizes = torch.linspace(0.2, 3, inputs)
    tokens = (torch.randn(2048, inputs, generator=generator) @ mixing + 0.3) * sizes
    return weight, tokens


def hessian_of(tokens):
    exact = tokens.double()
    return exact.t() @ exact / len(tokens)


def change_of_output(weight, quantized, tokens):
    return float(((weight - quantized) @ tokens.t()).pow(2).sum())


def options(**changes):
    return SolverOptions(**{"group_size": GROUP, "damp_percent": 0.01, "rounds": 2} | changes)


def solve_plainly(weight, hessian):
    """GPTQ as its paper writes it: column after column, with the inverse of H."""
    codes_scale = weight.reshape(len(weight), -1, GROUP).abs().amax(-1) / 7
    scales = codes_scale.half().float().repeat_interleave(GROUP, dim=1)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian)).double()
    inverse = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    rest, result = weight.double(), torch.zeros_like(weight).double()
    for column in range(weight.shape[1]):
        scale = scales[:, column].double()
        result[:, column] = (rest[:, column] / scale).round().clamp(-8, 7) * scale
        error = (rest[:, column] - result[:, column]) / inverse[column, column]
        rest[:, column:] -= torch.outer(error, inverse[column, column:])
    return result.float()


@pytest.mark.parametrize("seed", range(3))
def test_output_changes_less_than_a_third_as_much_as_by_rounding(seed):
    weight, tokens = random_case(seed=seed)
    solved = solve(weight, hessian_of(tokens), options()).dequantize()
    rounded = round_to_nearest(weight, group_size=GROUP).dequantize()
    exact = change_of_output(weight, solved, tokens)
    assert exact < change_of_output(weight, rounded, tokens) / 3


@pytest.mark.parametrize("seed", range(3))
def test_output_changes_less_than_by_the_published_algorithm(seed):
    weight, tokens = random_case(seed=seed)
    hessian = hessian_of(tokens)
    ours = solve(weight, hessian, options()).dequantize()
    plain = solve_plainly(weight, hessian)
    assert change_of_output(weight, ours, tokens) < 0.8 * change_of_output(weight, plain, tokens)


def test_rounding_with_feedback_alone_is_the_published_algorithm():
    from qwen.gptq_solver import _damped, _Search

    weight, tokens = random_case()
    hessian = _damped(hessian_of(tokens), 0.01)
    search = _Search(weight, hessian.float(), GROUP)
    search.choose_scales()
    scales = search.scales.repeat_interleave(GROUP, dim=1)
    search.round_with_feedback(hessian)
    order = hessian.diagonal().argsort(descending=True)
    inverse = torch.linalg.cholesky(torch.linalg.inv(hessian[order][:, order]), upper=True)
    rest, expected = weight[:, order].double(), torch.zeros_like(weight)
    for column in range(weight.shape[1]):
        level = (rest[:, column] / scales[:, order[column]]).round().clamp(-8, 7)
        error = (rest[:, column] - level * scales[:, order[column]]) / inverse[column, column]
        rest[:, column:] -= torch.outer(error, inverse[column, column:])
        expected[:, order[column]] = level.float()
    # Float32 here and float64 there may part where a value lies in the middle of two levels.
    assert (search.levels == expected).float().mean() > 0.98


def test_every_round_lowers_the_error():
    weight, tokens = random_case()
    hessian = hessian_of(tokens)
    errors = [
        output_error(weight, solve(weight, hessian, options(rounds=n)).dequantize(), hessian)
        for n in (0, 1, 2)
    ]
    assert errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize("rounds", [0, 1])
def test_weights_do_not_shrink(rounds):
    """The least error shrinks them by about 1 %, which all layers of a model would multiply."""
    weight, tokens = random_case(outputs=256)
    solved = solve(weight, hessian_of(tokens), options(rounds=rounds)).dequantize()
    kept = (weight * solved).sum(1) / weight.square().sum(1)
    assert kept.min() > 0.999
    assert kept.max() < 1.001


def test_codes_are_four_bits_and_scales_are_what_float16_holds():
    weight, tokens = random_case()
    solved = solve(weight, hessian_of(tokens), options())
    assert solved.codes.dtype == torch.uint8
    assert solved.codes.max() <= 15
    assert solved.codes.shape == (48, 128)
    assert solved.scales.dtype == torch.float16
    assert solved.scales.shape == (48, 4)


def test_weights_on_the_grid_come_back_exactly():
    levels = torch.randint(-8, 8, (16, 64), generator=torch.Generator().manual_seed(0))
    levels[:, ::GROUP], levels[:, 1::GROUP] = -8, 7
    weight = levels * 0.25
    solved = solve(weight, torch.eye(64).double(), options())
    assert torch.equal(solved.dequantize(), weight)


def test_largest_positive_weight_is_reached_by_a_negative_scale():
    weight = torch.zeros(1, GROUP)
    weight[0, 0], weight[0, 1] = 8.0, -7.0
    solved = solve(weight, torch.eye(GROUP).double(), options())
    assert solved.scales[0, 0] == -1
    assert torch.equal(solved.dequantize(), weight)


def test_input_that_is_never_seen_keeps_its_weight_nearly():
    weight, tokens = random_case()
    tokens[:, 5] = 0
    solved = solve(weight, hessian_of(tokens), options()).dequantize()
    rounded = round_to_nearest(weight, group_size=GROUP)
    steps = rounded.scales.float()[:, 0]
    assert ((solved[:, 5] - weight[:, 5]).abs() <= 1.5 * steps).all()


def test_layer_that_sees_nothing_is_rounded():
    weight, _ = random_case()
    solved = solve(weight, torch.zeros(128, 128).double(), options()).dequantize()
    rounded = round_to_nearest(weight, group_size=GROUP).dequantize()
    assert (solved - weight).pow(2).sum() <= (rounded - weight).pow(2).sum()


@pytest.mark.parametrize("value", [0.0, 1e-9, -1e-7])
def test_weights_too_small_for_a_scale_become_nothing_that_is_not_finite(value):
    weight = torch.full((2, GROUP), value)
    for done in (
        solve(weight, torch.eye(GROUP).double(), options()),
        round_to_nearest(weight, group_size=GROUP),
    ):
        assert done.dequantize().isfinite().all()
        assert done.dequantize().abs().max() < 1e-3


def test_solution_does_not_change_what_it_is_given():
    weight, tokens = random_case()
    hessian = hessian_of(tokens)
    before = weight.clone(), hessian.clone()
    solve(weight, hessian, options())
    assert torch.equal(weight, before[0])
    assert torch.equal(hessian, before[1])


@settings(max_examples=25, deadline=None)
@given(st.floats(1e-2, 1e3), st.integers(0, 2**16))
def test_rounding_is_off_by_half_a_step_at_most(size, seed):
    weight = torch.randn(4, 2 * GROUP, generator=torch.Generator().manual_seed(seed)) * size
    done = round_to_nearest(weight, group_size=GROUP)
    steps = done.scales.float().repeat_interleave(GROUP, dim=1)
    # The scale is itself rounded to float16, so the largest weight may miss its level by 7 * 2^-11.
    assert ((done.dequantize() - weight).abs() <= 0.505 * steps).all()


def test_dequantised_is_codes_less_eight_times_the_scale():
    codes = torch.tensor([[0, 8, 15, 9]], dtype=torch.uint8)
    scales = torch.tensor([[0.5, -2.0]]).half()
    done = QuantizedWeight(codes, scales, group_size=2)
    assert done.dequantize().tolist() == [[-4.0, 0.0, -14.0, -2.0]]
