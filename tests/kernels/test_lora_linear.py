"""The op `lora_linear` against plain autograd in float64."""

import itertools
from dataclasses import replace

import pytest
import torch
from adapter_cases import (
    D_IN,
    D_OUT,
    SCALING,
    TOLERANCE,
    P,
    check_equal_to_plain,
    check_near,
    check_no_rows,
    check_second_derivative_is_refused,
    lora_case,
)
from torch import Tensor

from fedsa_kernels import lora_linear
from fedsa_kernels.lora_linear import reference


@pytest.mark.parametrize("dropout", [False, True], ids=["plain", "dropout"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("weight", [True, False], ids=["weight", "branch-alone"])
@pytest.mark.parametrize("shape", [(12,), (6, 7), (3, 2, 5)], ids=["R12", "R6-T7", "R3-S2-T5"])
@pytest.mark.parametrize("clients", [1, 3], ids=["C1", "C3"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
def test_output_and_all_gradients_equal_plain_autograd(
    dtype, clients, shape, weight, bias, dropout
):
    case = lora_case(
        clients=clients, shape=shape, weight=weight, bias=bias, dropout=dropout, dtype=dtype
    )
    assert case.run().dtype == dtype
    check_equal_to_plain(case, TOLERANCE[dtype])


@pytest.mark.parametrize("clients", [1, 3], ids=["C1", "C3"])
def test_x_may_be_a_view(make_view, clients):
    case = lora_case(clients=clients, dropout=True)
    check_equal_to_plain(replace(case, x=make_view(6, 7, D_IN)), 1e-12)


@pytest.mark.parametrize("clients", [1, 3], ids=["C1", "C3"])
def test_gradient_may_come_in_as_a_view(clients):
    """The gradient of a sum is one number expanded over y, with strides of zero."""
    case = lora_case(clients=clients)
    ours = torch.autograd.grad(case.run().sum(), (case.x, case.A, case.B))
    dense = torch.ones(6, 7, D_OUT, dtype=torch.float64)
    theirs = torch.autograd.grad(case.run(), (case.x, case.A, case.B), dense)
    for actual, expected in zip(ours, theirs, strict=True):
        check_near(actual, expected, 1e-12)


@pytest.mark.parametrize("dropout", [False, True], ids=["plain", "dropout"])
@pytest.mark.parametrize("needs", itertools.product([True, False], repeat=3))
def test_frozen_inputs_get_no_gradient_and_change_no_other(needs, dropout):
    case = lora_case(needs=needs, dropout=dropout)
    expected, gradients = case.plain()
    y = case.run()
    check_near(y, expected, 1e-12)
    assert y.requires_grad == any(needs)
    if not any(needs):
        return
    y.square().sum().backward()
    for tensor, needed, gradient in zip((case.x, case.A, case.B), needs, gradients, strict=True):
        if needed:
            check_near(tensor.grad, gradient, 1e-12)
        else:
            assert tensor.grad is None


@pytest.mark.parametrize("clients", [1, 3], ids=["C1", "C3"])
def test_the_order_of_gpus_gives_the_same(clients, monkeypatch):
    monkeypatch.setattr(reference, "short_side_first", lambda wide: False)
    check_equal_to_plain(lora_case(clients=clients, dropout=True), 1e-12)


def test_weight_and_bias_are_frozen():
    case = lora_case()
    case.weight.requires_grad_()
    case.bias.requires_grad_()
    case.run().sum().backward()
    assert case.weight.grad is None
    assert case.bias.grad is None


@pytest.mark.parametrize("clients", [1, 2], ids=["C1", "C2"])
@pytest.mark.parametrize("dropout", [False, True], ids=["plain", "dropout"])
def test_gradients_equal_finite_differences(clients, dropout):
    case = lora_case(clients=clients, shape=(2, 2), sizes=(7, 4, 3), dropout=dropout)

    def op(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        p = P if dropout else 0.0
        return lora_linear(x, case.weight, None, A, B, SCALING, dropout=p, keys=case.keys)

    assert torch.autograd.gradcheck(op, case.trained)


@pytest.mark.usefixtures("_without_type_checks")
@pytest.mark.parametrize("needs", [(True, True, True), (False, True, True), (False, False, True)])
@pytest.mark.parametrize(
    ("clients", "dropout", "weight"), [(1, True, False), (3, True, True), (3, False, False)]
)
def test_ops_keep_the_rules_of_torch_library(clients, dropout, weight, needs):
    case = lora_case(
        clients=clients,
        shape=(6,),
        weight=weight,
        bias=not dropout,
        dropout=dropout,
        needs=needs,
    )
    case.check_ops(needs=needs)


@pytest.mark.usefixtures("_without_type_checks")
def test_ops_keep_the_rules_of_torch_library_for_an_input_with_gaps():
    case = lora_case(clients=2, shape=(6,), dtype=torch.bfloat16, needs=(False,) * 3)
    x = torch.randn(12, 2 * D_IN, dtype=torch.bfloat16)[::2, ::2]
    replace(case, x=x).check_ops(needs=(True, False, False))


@pytest.mark.parametrize("weight", [True, False], ids=["weight", "branch-alone"])
def test_factors_in_float32_fit_a_base_in_half_precision(weight):
    """All products are made in the dtype of x, and the factors' gradients come back in theirs."""
    fine = lora_case(dtype=torch.float32)
    coarse = lora_case(dtype=torch.bfloat16, weight=weight, dropout=True)
    case = replace(coarse, A=fine.A, B=fine.B)
    assert case.run().dtype == torch.bfloat16
    check_equal_to_plain(case, TOLERANCE[torch.bfloat16])


def test_autocast_makes_the_products_in_half_precision():
    case = lora_case(dtype=torch.float32, dropout=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = case.run()
        check_equal_to_plain(case, TOLERANCE[torch.bfloat16])
    halved = {n: getattr(case, n).detach().bfloat16() for n in ("x", "weight", "bias", "A", "B")}
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, replace(case, **halved).run())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("clients", [1, 2], ids=["C1", "C2"])
def test_a_scaling_of_zero_leaves_the_frozen_layer_on_whatever_memory(clients, dtype):
    case = lora_case(clients=clients, shape=(40,), sizes=(64, 300, 8), bias=False, dtype=dtype)
    torch.use_deterministic_algorithms(True)  # torch then fills new memory with NaN
    try:
        y = lora_linear(case.x, case.weight, None, case.A, case.B, 0.0)
        dx, dA, dB = torch.autograd.grad(y, case.trained, torch.ones_like(y))
    finally:
        torch.use_deterministic_algorithms(False)
    check_near(y, case.x @ case.weight.T, TOLERANCE[dtype])
    check_near(dx, torch.ones_like(y) @ case.weight, TOLERANCE[dtype])
    assert not dA.any()
    assert not dB.any()


def test_rows_that_do_not_split_over_clients_are_refused():
    case = lora_case(clients=3, shape=(7,))
    with pytest.raises(ValueError, match="7 rows do not split into 3 client segments"):
        case.run()


@pytest.mark.parametrize("given", ["no keys", "p is zero"])
def test_dropout_is_off_without_keys_or_probability(given):
    case = lora_case(dropout=True)
    p, keys = (P, None) if given == "no keys" else (0.0, case.keys)
    y = lora_linear(case.x, case.weight, case.bias, case.A, case.B, SCALING, dropout=p, keys=keys)
    assert torch.equal(y, replace(case, keys=None).run())


def test_gradients_of_clients_do_not_mix():
    case = lora_case(clients=3)
    case.run()[2:4].sum().backward()  # the rows of client 1
    for factor in (case.A, case.B):
        assert torch.count_nonzero(factor.grad[[0, 2]]) == 0
        assert torch.count_nonzero(factor.grad[1]) > 0


@pytest.mark.usefixtures("_without_type_checks")
@pytest.mark.parametrize("weight", [True, False], ids=["weight", "branch-alone"])
@pytest.mark.parametrize("dropout", [False, True], ids=["plain", "dropout"])
def test_compiled_op_gives_the_same_result(dropout, weight):
    case = lora_case(dropout=dropout, weight=weight)
    torch._dynamo.reset()  # what other tests compiled counts against its limit
    compiled = torch.compile(lora_linear, fullgraph=True, backend="aot_eager")
    results = []
    for op in (lora_linear, compiled):
        y = case.run(op)
        results.append([y, *torch.autograd.grad(y.square().sum(), (case.x, case.A, case.B))])
    for eager, ours in zip(*results, strict=True):
        assert torch.equal(eager, ours)


def test_a_batch_without_rows():
    check_no_rows(lora_case, None)


def test_a_second_derivative_is_refused():
    check_second_derivative_is_refused(lora_case())
