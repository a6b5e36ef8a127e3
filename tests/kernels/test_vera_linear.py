"""The op `vera_linear` against plain autograd in float64."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from fedsa_kernels import keep_mask, lora_linear, vera_linear

D_IN, D_OUT, RANK, P = 37, 23, 5, 0.3
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class Case:
    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    A: Tensor
    B: Tensor
    d: Tensor
    b: Tensor
    keys: Tensor | None = None

    @property
    def trained(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.x, self.d, self.b

    def run(self, op=vera_linear) -> Tensor:
        p = 0.0 if self.keys is None else P
        inputs = (self.x, self.weight, self.bias, self.A, self.B, self.d, self.b)
        return op(*inputs, dropout=p, keys=self.keys)


def make_case(
    *,
    clients: int = 3,
    shape: Sequence[int] = (6, 7),
    weight: bool = True,
    bias: bool = True,
    dropout: bool = False,
    dtype: torch.dtype = torch.float64,
    needs: Sequence[bool] = (True, True, True),
) -> Case:
    """Random inputs; `needs` says which of x, d and b want a gradient."""
    stream = torch.Generator().manual_seed(1)

    def draw(*sizes: int, needed: bool = False) -> Tensor:
        values = torch.randn(*sizes, generator=stream, dtype=torch.float64)
        return values.to(dtype).requires_grad_(needed)

    keys = torch.randint(-(2**31), 2**31, tuple(shape), generator=stream, dtype=torch.int32)
    return Case(
        x=draw(*shape, D_IN, needed=needs[0]),
        weight=draw(D_OUT, D_IN) if weight else None,
        bias=draw(D_OUT) if bias else None,
        A=draw(RANK, D_IN),
        B=draw(D_OUT, RANK),
        d=draw(clients, RANK, needed=needs[1]),
        b=draw(clients, D_OUT, needed=needs[2]),
        keys=keys if dropout else None,
    )


def random(*sizes: int) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def plain(case: Case) -> tuple[Tensor, list[Tensor]]:
    """y and the gradients of sum(y²) for x, d, b, from the formula, client by client."""
    x, d, b = (t.detach().double().requires_grad_() for t in case.trained)
    flat = x.reshape(-1, D_IN)
    dropped = flat
    if case.keys is not None:
        dropped = flat * keep_mask(case.keys.reshape(-1), D_IN, P) / (1 - P)
    bias = 0.0 if case.bias is None else case.bias.double()
    size = len(flat) // len(d)
    segments = []
    for c in range(len(d)):
        rows = slice(c * size, (c + 1) * size)
        update = torch.diag(b[c]) @ case.B.double() @ torch.diag(d[c]) @ case.A.double()
        frozen = 0.0 if case.weight is None else flat[rows] @ case.weight.double().T
        segments.append(frozen + bias + dropped[rows] @ update.T)
    y = torch.cat(segments).reshape(*x.shape[:-1], D_OUT)
    return y.detach(), list(torch.autograd.grad(y.square().sum(), (x, d, b)))


def assert_near(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Largest error within tolerance times the largest expected value."""
    assert actual.shape == expected.shape
    error = (actual.detach().double() - expected).abs().max()
    assert error <= tolerance * expected.abs().max()


def assert_equal_to_plain(case: Case, tolerance: float) -> None:
    """Output and all gradients, each gradient in the dtype of its own tensor."""
    expected, gradients = plain(case)
    y = case.run()
    assert_near(y, expected, tolerance)
    actual = torch.autograd.grad(y.double().square().sum(), case.trained)
    for ours, theirs, tensor in zip(actual, gradients, case.trained, strict=True):
        assert ours.dtype == tensor.dtype
        assert_near(ours, theirs, tolerance)


@pytest.mark.parametrize("dropout", [False, True], ids=["plain", "dropout"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("weight", [True, False], ids=["weight", "branch-alone"])
@pytest.mark.parametrize("shape", [(12,), (6, 7), (3, 2, 5)], ids=["R12", "R6-T7", "R3-S2-T5"])
@pytest.mark.parametrize("clients", [1, 3], ids=["C1", "C3"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
def test_output_and_all_gradients_equal_plain_autograd(
    dtype, clients, shape, weight, bias, dropout
):
    case = make_case(
        clients=clients, shape=shape, weight=weight, bias=bias, dropout=dropout, dtype=dtype
    )
    assert case.run().dtype == dtype
    assert_equal_to_plain(case, TOLERANCE[dtype])


@pytest.mark.parametrize("clients", [1, 3], ids=["C1", "C3"])
def test_x_may_be_a_view(make_view, clients):
    case = make_case(clients=clients, dropout=True)
    assert_equal_to_plain(replace(case, x=make_view(6, 7, D_IN)), 1e-12)


def test_frozen_factors_may_be_views():
    """Every layer of a model takes a slice of one pair of factors, so A has gaps."""
    turned = random(D_IN, D_OUT).t()  # what a Conv1D layer gives
    case = replace(make_case(dropout=True), A=random(RANK, D_IN + 8)[:, :D_IN], weight=turned)
    assert not case.A.is_contiguous()
    assert not case.weight.is_contiguous()
    assert_equal_to_plain(case, 1e-12)


@pytest.mark.parametrize("clients", [1, 3], ids=["C1", "C3"])
def test_gradient_may_come_in_as_a_view(clients):
    """The gradient of a sum is one number expanded over y, with strides of zero."""
    case = make_case(clients=clients)
    ours = torch.autograd.grad(case.run().sum(), case.trained)
    dense = torch.ones(6, 7, D_OUT, dtype=torch.float64)
    theirs = torch.autograd.grad(case.run(), case.trained, dense)
    for actual, expected in zip(ours, theirs, strict=True):
        assert_near(actual, expected, 1e-12)


@pytest.mark.parametrize("dropout", [False, True], ids=["plain", "dropout"])
@pytest.mark.parametrize("needs", itertools.product([True, False], repeat=3))
def test_frozen_inputs_get_no_gradient_and_change_no_other(needs, dropout):
    case = make_case(needs=needs, dropout=dropout)
    expected, gradients = plain(case)
    y = case.run()
    assert_near(y, expected, 1e-12)
    assert y.requires_grad == any(needs)
    if not any(needs):
        return
    y.square().sum().backward()
    for tensor, needed, gradient in zip(case.trained, needs, gradients, strict=True):
        if needed:
            assert_near(tensor.grad, gradient, 1e-12)
        else:
            assert tensor.grad is None


def test_weight_bias_and_random_factors_are_frozen():
    case = make_case()
    frozen = (case.weight, case.bias, case.A, case.B)
    for tensor in frozen:
        tensor.requires_grad_()
    case.run().sum().backward()
    assert all(tensor.grad is None for tensor in frozen)
    assert all(tensor.grad is not None for tensor in case.trained)


@pytest.mark.parametrize("clients", [1, 2], ids=["C1", "C2"])
@pytest.mark.parametrize("dropout", [False, True], ids=["plain", "dropout"])
def test_gradients_equal_finite_differences(clients, dropout):
    case = make_case(clients=clients, shape=(2, 2), dropout=dropout)
    b = case.b[:, :4].detach().requires_grad_()

    def op(x: Tensor, d: Tensor, b: Tensor) -> Tensor:
        p = P if dropout else 0.0
        weight, B = case.weight[:4], case.B[:4]
        return vera_linear(x, weight, None, case.A, B, d, b, dropout=p, keys=case.keys)

    assert torch.autograd.gradcheck(op, (case.x, case.d, b))


@pytest.mark.usefixtures("_without_type_checks")
@pytest.mark.parametrize(
    "needs", [(True, True, True), (False, True, True), (False, False, True), (False, False, False)]
)
@pytest.mark.parametrize(
    ("clients", "dropout", "weight"), [(1, False, True), (3, True, True), (3, False, False)]
)
def test_op_keeps_the_rules_of_torch_library(clients, dropout, weight, needs):
    case = make_case(
        clients=clients,
        shape=(6,),
        weight=weight,
        bias=not dropout,
        dropout=dropout,
        needs=needs,
    )
    frozen = (case.weight, case.bias, case.A, case.B)
    inputs = (case.x, *frozen, case.d, case.b, P, case.keys)
    torch.library.opcheck(torch.ops.fedsa.vera_linear.default, inputs)


@pytest.mark.parametrize("weight", [True, False], ids=["weight", "branch-alone"])
def test_vectors_in_float32_fit_a_base_in_half_precision(weight):
    """All products are made in the dtype of x, and the vectors' gradients come back in theirs."""
    fine = make_case(dtype=torch.float32)
    coarse = make_case(dtype=torch.bfloat16, weight=weight, dropout=True)
    case = replace(coarse, A=fine.A, B=fine.B, d=fine.d, b=fine.b)
    assert case.run().dtype == torch.bfloat16
    assert_equal_to_plain(case, TOLERANCE[torch.bfloat16])


def test_autocast_makes_the_products_in_half_precision():
    case = make_case(dtype=torch.float32, dropout=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = case.run()
        assert_equal_to_plain(case, TOLERANCE[torch.bfloat16])
    halved = {n: getattr(case, n).detach().bfloat16() for n in ("x", "weight", "bias", *"ABdb")}
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, replace(case, **halved).run())


def test_rows_that_do_not_split_over_clients_are_refused():
    case = make_case(clients=3, shape=(7,))
    with pytest.raises(ValueError, match="7 rows do not split into 3 client segments"):
        case.run()


@pytest.mark.parametrize("given", ["no keys", "p is zero"])
def test_dropout_is_off_without_keys_or_probability(given):
    case = make_case(dropout=True)
    p, keys = (P, None) if given == "no keys" else (0.0, case.keys)

    def op(*inputs: Tensor, **_: object) -> Tensor:
        return vera_linear(*inputs, dropout=p, keys=keys)

    assert torch.equal(case.run(op), replace(case, keys=None).run())


@pytest.mark.parametrize("dropout", [False, True], ids=["plain", "dropout"])
def test_it_is_lora_with_scaled_factors_and_drops_the_same_elements(dropout):
    case = make_case(dropout=dropout)

    def as_lora(x, weight, bias, A, B, d, b, **options) -> Tensor:
        return lora_linear(x, weight, bias, d[:, :, None] * A, b[:, :, None] * B, 1.0, **options)

    ours, theirs = case.run(), case.run(as_lora)
    assert_near(ours, theirs.detach(), 1e-12)
    gradients = [torch.autograd.grad(y.square().sum(), case.trained) for y in (ours, theirs)]
    for actual, expected in zip(*gradients, strict=True):
        assert_near(actual, expected, 1e-12)


def test_gradients_of_clients_do_not_mix():
    case = make_case(clients=3)
    case.run()[2:4].sum().backward()  # the rows of client 1
    for vector in (case.d, case.b):
        assert torch.count_nonzero(vector.grad[[0, 2]]) == 0
        assert torch.count_nonzero(vector.grad[1]) > 0


@pytest.mark.usefixtures("_without_type_checks")
@pytest.mark.parametrize("weight", [True, False], ids=["weight", "branch-alone"])
@pytest.mark.parametrize("dropout", [False, True], ids=["plain", "dropout"])
def test_compiled_op_gives_the_same_result(dropout, weight):
    case = make_case(dropout=dropout, weight=weight)
    compiled = torch.compile(vera_linear, fullgraph=True, backend="aot_eager")
    results = []
    for op in (vera_linear, compiled):
        y = case.run(op)
        results.append([y, *torch.autograd.grad(y.square().sum(), case.trained)])
    for eager, ours in zip(*results, strict=True):
        assert torch.equal(eager, ours)
