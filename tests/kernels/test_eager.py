"""Ops in eager mode: what autograd sees of them, whatever the dimensions of x."""

import pytest
import torch
from adapter_cases import check_equal_to_plain, check_near, lora_case, vera_case

CASES = {"lora": lora_case, "vera": vera_case}
SHAPES = [(6,), (6, 7), (3, 2, 5)]


@pytest.mark.parametrize("case_of", CASES.values(), ids=CASES)
def test_x_may_be_one_vector(case_of):
    case = case_of(clients=1, shape=())
    assert case.run().dim() == 1
    check_equal_to_plain(case, 1e-12)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("case_of", CASES.values(), ids=CASES)
def test_the_output_may_be_changed_in_place(case_of, shape):
    """As a residual connection or an activation does it."""
    case = case_of(shape=shape)
    y = case.run()
    assert not y._is_view()
    doubled = torch.autograd.grad(y.mul_(2.0).sum(), case.trained)
    single = torch.autograd.grad(case.run().sum(), case.trained)
    for actual, expected in zip(doubled, single, strict=True):
        check_near(actual, 2 * expected, 1e-12)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_an_x_that_was_changed_since_is_noticed(shape):
    case = lora_case(shape=shape)
    y = case.run()
    with torch.no_grad():
        case.x.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("case_of", CASES.values(), ids=CASES)
def test_autograd_sees_one_step_with_gradients_of_the_same_shapes(case_of, shape):
    case = case_of(shape=shape)
    y = case.run()
    leaves = [function for function, _ in y.grad_fn.next_functions if function is not None]
    assert {leaf.name() for leaf in leaves} == {"torch::autograd::AccumulateGrad"}
    y.sum().backward()
    assert all(each.grad.shape == each.shape for each in case.trained)
