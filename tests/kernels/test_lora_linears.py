"""The op `lora_linears` against plain autograd in float64, layer by layer."""

import itertools
from dataclasses import replace

import pytest
import torch
from adapter_cases import D_IN, SCALING, TOLERANCE
from linears_cases import GROUPED_QUERIES, LinearsCase, check_linears, linears_case, loss
from torch import Tensor

from fedsa_kernels import lora_linears
from fedsa_kernels.lora_linear import reference


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("shape", [(12,), (6, 7), (3, 2, 5)], ids=["R12", "R6-T7", "R3-S2-T5"])
@pytest.mark.parametrize("clients", [1, 3], ids=["C1", "C3"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
def test_outputs_and_all_gradients_equal_plain_autograd(dtype, clients, shape, count):
    case = linears_case(clients=clients, shape=shape, sizes=GROUPED_QUERIES[:count], dtype=dtype)
    check_linears(case, TOLERANCE[dtype])


@pytest.mark.parametrize("bias", itertools.product([True, False], repeat=2))
def test_each_layer_may_have_a_bias_or_none(bias):
    check_linears(linears_case(bias=bias, sizes=GROUPED_QUERIES[:2]), 1e-12)


@pytest.mark.parametrize("needs", itertools.product([True, False], repeat=5))
def test_any_of_the_gradients_may_be_left_out(needs):
    case = linears_case(needs=needs, sizes=GROUPED_QUERIES[:2])
    assert any(y.requires_grad for y in case.run()) == any(needs)
    check_linears(case, 1e-12)


def test_x_may_be_a_view(make_view):
    case = linears_case(clients=3)
    x = make_view(6, 7, D_IN)
    layers = tuple(replace(each, x=x) for each in case.layers)
    check_linears(LinearsCase(layers), 1e-12)


@pytest.mark.parametrize("clients", [1, 3])
def test_the_order_of_gpus_gives_the_same(clients, monkeypatch):
    monkeypatch.setattr(reference, "short_side_first", lambda wide: False)
    check_linears(linears_case(clients=clients), 1e-12)


def test_layer_whose_output_nobody_uses_gets_zeros_and_changes_nothing():
    case = linears_case(sizes=GROUPED_QUERIES)
    first = case.layers[0]
    found = torch.autograd.grad(case.run()[0].square().sum(), case.trained)
    _, (dx, dA, dB) = first.plain()
    torch.testing.assert_close(found[0], dx)
    torch.testing.assert_close(found[1], dA)
    torch.testing.assert_close(found[4], dB)
    assert not any(found[k].any() for k in (2, 3, 5, 6))


def test_gradients_of_clients_do_not_mix():
    case = linears_case(clients=3)
    loss([y[2:4] for y in case.run()]).backward()  # the rows of client 1
    for factor in case.trained[1:]:
        assert torch.count_nonzero(factor.grad[[0, 2]]) == 0
        assert torch.count_nonzero(factor.grad[1]) > 0


def test_factors_in_float32_fit_a_base_in_half_precision():
    coarse, fine = linears_case(dtype=torch.bfloat16), linears_case(dtype=torch.float32)
    layers = tuple(
        replace(each, A=other.A, B=other.B)
        for each, other in zip(coarse.layers, fine.layers, strict=True)
    )
    check_linears(LinearsCase(layers), TOLERANCE[torch.bfloat16])


def test_autocast_makes_the_products_in_half_precision():
    case = linears_case(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = case.run()
    halved = linears_case(dtype=torch.bfloat16)
    for y, expected in zip(found, halved.run(), strict=True):
        assert y.dtype == torch.bfloat16
        assert torch.equal(y, expected)


@pytest.mark.parametrize("factors", [torch.float16, torch.float64])
@pytest.mark.parametrize("x", [torch.float32, torch.float64])
def test_factors_of_any_dtype_may_be_used_under_autocast(factors, x):
    """On its own it joins float32 and its own dtype only."""
    wide, fine = linears_case(dtype=x), linears_case(dtype=factors)
    layers = tuple(
        replace(each, A=other.A, B=other.B)
        for each, other in zip(wide.layers, fine.layers, strict=True)
    )
    case = LinearsCase(layers)
    with torch.autocast("cpu", torch.bfloat16):
        ys = case.run()
        alone = [each.run() for each in layers]
    for y, expected in zip(ys, alone, strict=True):
        assert y.dtype == (torch.float64 if x == torch.float64 else torch.bfloat16)
        torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("ranks", [(200, 57), (257,)])
def test_more_rank_than_a_kernel_holds_is_refused(ranks):
    case = linears_case(sizes=[(4, rank) for rank in ranks])
    with pytest.raises(ValueError, match="ranks of 257 together, over 256"):
        case.run()


def test_rows_that_do_not_split_over_clients_are_refused():
    with pytest.raises(ValueError, match="7 rows do not split into 3 client segments"):
        linears_case(clients=3, shape=(7,)).run()


@pytest.mark.usefixtures("_without_type_checks")
@pytest.mark.parametrize("clients", [1, 3], ids=["C1", "C3"])
@pytest.mark.parametrize("needs", [[True] * 7, [False] + [True] * 6, [True] + [False] * 6])
def test_op_keeps_the_rules_of_torch_library(clients, needs):
    case = linears_case(clients=clients, shape=(6,), needs=needs)
    biases = [torch.zeros(0) if each.bias is None else each.bias for each in case.layers]
    A = torch.cat([each.A for each in case.layers], 1).detach().requires_grad_(needs[1])
    weights, Bs = ([getattr(each, name) for each in case.layers] for name in ("weight", "B"))
    inputs = (case.x, weights, biases, A, Bs, SCALING, None)
    torch.library.opcheck(torch.ops.fedsa.lora_linears.default, inputs)


@pytest.mark.usefixtures("_without_type_checks")
def test_compiled_op_gives_the_same_result():
    case = linears_case()
    torch._dynamo.reset()  # what other tests compiled counts against its limit
    compiled = torch.compile(lora_linears, fullgraph=True, backend="aot_eager")
    columns = zip(*((k.weight, k.bias, k.A, k.B) for k in case.layers), strict=True)
    weights, biases, As, Bs = map(list, columns)
    results: list[list[Tensor]] = []
    for op in (lora_linears, compiled):
        ys = op(case.x, weights, biases, As, Bs, SCALING)
        results.append([*ys, *torch.autograd.grad(loss(ys), case.trained)])
    for eager, ours in zip(*results, strict=True):
        assert torch.equal(eager, ours)


@pytest.mark.usefixtures("_without_type_checks")
@pytest.mark.parametrize(
    ("layer", "changed", "named"),
    [
        (0, lambda k: replace(k, A=k.A[:, :2]), r"Bs\[0\]"),
        (1, lambda k: replace(k, B=k.B[:1]), r"Bs\[1\]"),
        (1, lambda k: replace(k, A=k.A[..., :9]), r"As\[1\]"),
        (1, lambda k: replace(k, weight=k.weight[:3]), r"weights\[1\]"),
        (0, lambda k: replace(k, bias=torch.zeros(2, dtype=k.x.dtype)), r"biases\[0\]"),
    ],
)
def test_shapes_that_do_not_fit_are_refused_by_name(layer, changed, named):
    """Two layers whose ranks are wrong alone but right together would share columns of xa."""
    layers = list(linears_case(clients=2).layers)
    layers[layer] = changed(layers[layer])
    with pytest.raises(ValueError, match=f"lora_linears: {named} is .* and not "):
        LinearsCase(tuple(layers)).run()


@pytest.mark.usefixtures("_without_type_checks")
@pytest.mark.parametrize("wrong", [lambda A: A[0], lambda A: A[:0]])
def test_factors_without_clients_are_refused_by_name(wrong):
    layers = list(linears_case(clients=2).layers)
    layers[1] = replace(layers[1], A=wrong(layers[1].A))
    with pytest.raises(ValueError, match=r"lora_linears: As\[1\] is .* axes, the first of clients"):
        LinearsCase(tuple(layers)).run()


@pytest.mark.usefixtures("_without_type_checks")
def test_every_layer_needs_a_weight():
    first, second = linears_case(sizes=GROUPED_QUERIES[:2]).layers
    with pytest.raises(ValueError, match=r"lora_linears: weights\[1\] is missing"):
        LinearsCase((first, replace(second, weight=None))).run()


def test_layers_are_needed():
    with pytest.raises(ValueError, match="lora_linears: there are no layers"):
        lora_linears(torch.zeros(3, 4), [], [], [], [], SCALING)


@pytest.mark.usefixtures("_without_type_checks")
def test_as_many_of_everything_are_needed():
    first, second = linears_case(sizes=GROUPED_QUERIES[:2]).layers
    both = [first.weight, second.weight]
    with pytest.raises(ValueError, match=r"\[2, 1, 2, 2\] weights, biases, As and Bs"):
        lora_linears(first.x, both, [None], [first.A, second.A], [first.B, second.B], 1.0)


@pytest.mark.parametrize("shape", [(12,), (6, 7)], ids=str)
def test_outputs_may_be_changed_in_place(shape):
    """As a model does it that scales its queries, whether layers are computed together or not."""
    case = linears_case(shape=shape)
    doubled = torch.autograd.grad(loss([y.mul_(2.0) for y in case.run()]), case.trained)
    single = torch.autograd.grad(loss([2.0 * y for y in case.run()]), case.trained)
    assert all(map(torch.equal, doubled, single))


def test_an_x_that_was_changed_since_is_noticed():
    case = linears_case()
    found = loss(case.run())
    with torch.no_grad():
        case.x.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        found.backward()


def test_a_second_derivative_is_refused():
    case = linears_case()
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(sum(y.sum() for y in case.run()), [case.x], create_graph=True)


def test_gradients_have_the_dtypes_of_the_forward_pass_wherever_they_are_made():
    case = linears_case(dtype=torch.float32)
    found = loss(case.run())
    expected = torch.autograd.grad(found, case.trained, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        actual = torch.autograd.grad(found, case.trained)
    assert all(map(torch.equal, actual, expected))
