"""The kernels of `clipped_grad` in Triton's interpreter, against a loop over records in float64."""

import math

import pytest
import torch
from clipped_grad_ops import check_ops
from torch import Tensor

from fedsa_kernels import clipped_sum, sample_grad, sample_grad_with_norms, squared_norms
from fedsa_kernels.clipped_grad import reference
from fedsa_kernels.launch import interpreted

pytestmark = [
    pytest.mark.skipif(not interpreted(), reason="needs TRITON_INTERPRET=1"),
    # NumPy, which computes for the interpreter, warns where a GPU makes a NaN.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

# (tokens, m, k): whole with either side wide and ragged, several strips of both, and factors kept
# of one token, of a few and of more than one block of tokens.
WHOLE = [(9, 5, 37), (70, 37, 5), (3, 1, 40), (35, 66, 40)]
FACTORED = [(1, 5, 37), (3, 37, 5), (2, 3, 110), (18, 40, 72)]


def random(*sizes: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    stream = torch.Generator().manual_seed(seed)
    return torch.randn(*sizes, generator=stream, dtype=torch.float64).to(dtype)


def pair(tokens: int, m: int, k: int, rows: int = 6, dtype: torch.dtype = torch.float32):
    return random(rows, tokens, m, dtype=dtype), random(rows, tokens, k, seed=1, dtype=dtype)


def loop(left: Tensor, right: Tensor) -> Tensor:
    """One record at a time, one token at a time. [n, m, k]"""
    each = [
        sum(torch.outer(one, other) for one, other in zip(a, b, strict=True))
        for a, b in zip(left.double(), right.double(), strict=True)
    ]
    return torch.stack(each)


def weighted(each: Tensor, factors: Tensor) -> Tensor:
    """One record at a time, and none of factor 0. [C, m, k]"""
    clients, own = factors.shape
    total = torch.zeros(clients, *each.shape[1:], dtype=torch.float64)
    for row, factor in enumerate(factors.double().flatten()):
        if factor != 0:
            total[row // own] += factor * each[row]
    return total


def check_near(actual: Tensor, expected: Tensor, tolerance: float = 4e-5) -> None:
    """Norms of factors have a bound on rounding added to them, which is most of the tolerance."""
    assert actual.dtype == torch.float32
    assert actual.shape == expected.shape
    error = (actual.double() - expected).norm() / expected.norm()
    assert error <= tolerance, error


@pytest.fixture
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kernel does not write stays NaN."""
    fresh = torch.Tensor.new_empty

    def new_empty(self: Tensor, *sizes: int, **options: torch.dtype) -> Tensor:
        return fresh(self, *sizes, **options).fill_(math.nan)

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)


@pytest.mark.usefixtures("_poisoned")
@pytest.mark.parametrize("sizes", WHOLE + FACTORED, ids=str)
@pytest.mark.parametrize("clients", [1, 3], ids=["C1", "C3"])
def test_norms_and_sums_equal_a_loop_over_records(sizes, clients):
    _, m, k = sizes
    left, right = pair(*sizes)
    factors = random(clients, 6 // clients, seed=2)
    each = loop(left, right)
    found, squares = sample_grad_with_norms(left, right, backend="triton")
    assert (found.shape[-1] == m + k) == (sizes in FACTORED)
    check_near(squares, each.square().sum((1, 2)))
    check_near(squared_norms(found, (m, k), backend="triton"), each.square().sum((1, 2)))
    check_near(clipped_sum(found, factors, (m, k), backend="triton"), weighted(each, factors))


@pytest.mark.usefixtures("_poisoned")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("sizes", [WHOLE[0], WHOLE[1], FACTORED[1]], ids=str)
def test_every_dtype_is_worked_off_in_single(sizes, dtype):
    """Products of halves are exact in float32, so the bound is the same for all."""
    left, right = pair(*sizes, dtype=dtype)
    found, squares = sample_grad_with_norms(left, right, backend="triton")
    each = loop(left, right)
    check_near(squares, each.square().sum((1, 2)))
    ones = torch.ones(2, 3)
    check_near(clipped_sum(found, ones, sizes[1:], backend="triton"), weighted(each, ones))


def test_left_and_right_of_different_dtypes():
    left, right = pair(9, 5, 37)
    found = sample_grad(left.bfloat16(), right, backend="triton")
    check_near(found, loop(left.bfloat16(), right))


@pytest.mark.parametrize("sizes", [WHOLE[0], FACTORED[1]], ids=str)
def test_what_is_made_is_what_the_reference_makes(sizes):
    left, right = pair(*sizes)
    for whole in (False, True):
        found = sample_grad(left, right, whole, backend="triton")
        check_near(found, reference.sample_grad(left, right, whole).double())


@pytest.mark.parametrize("rank", [1, 16, 17, 128])
def test_any_rank(rank):
    left, right = pair(33, rank, 32, rows=2)
    found = sample_grad(left, right, whole=True, backend="triton")
    check_near(found, loop(left, right))
    check_near(sample_grad(right, left, True, backend="triton"), loop(right, left))


@pytest.mark.parametrize("sizes", [WHOLE[0], FACTORED[1]], ids=str)
def test_inputs_that_are_views(make_view, sizes):
    tokens, m, k = sizes
    left, right = (make_view(4, tokens, width).detach() for width in (m, k))
    # A cast keeps the strides of a dense view alone, so the numbers are put into the view's own.
    single = [
        torch.empty_strided(x.shape, x.stride(), dtype=torch.float32).copy_(x)
        for x in (left, right)
    ]
    assert not any(x.is_contiguous() for x in single)
    found, squares = sample_grad_with_norms(*single, backend="triton")
    each = loop(*single)
    check_near(squares, each.square().sum((1, 2)))
    factors = random(2, 2, seed=3).t()
    check_near(clipped_sum(found, factors, (m, k), backend="triton"), weighted(each, factors))


@pytest.mark.parametrize("shape", [(), (5,), (2, 3, 50)], ids=str)
def test_parameters_that_are_no_matrices(shape):
    gradients, factors = random(6, *shape), random(2, 3, seed=1)
    squares = squared_norms(gradients, shape, backend="triton")
    check_near(squares, gradients.double().view(6, -1).square().sum(1))
    found = clipped_sum(gradients, factors, shape, backend="triton")
    check_near(found, weighted(gradients.double(), factors))


@pytest.mark.usefixtures("_poisoned")
@pytest.mark.parametrize("own", [64, 130])
@pytest.mark.parametrize("tokens", [2, 9])
def test_sums_over_many_records_are_split_and_are_the_same(own, tokens):
    """At these sizes there are few programs, so that long sums are split into parts."""
    left, right = pair(tokens, 3, 20, rows=2 * own)
    factors = random(2, own, seed=2)
    found = reference.sample_grad(left, right, whole=False)
    expected = weighted(loop(left, right), factors)
    check_near(clipped_sum(found, factors, (3, 20), backend="triton"), expected)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("sizes", [WHOLE[0], WHOLE[1], *FACTORED[:3]], ids=str)
@pytest.mark.parametrize("side", [0, 1], ids=["left", "right"])
def test_factor_zero_takes_a_record_out_whatever_its_gradient_is(sizes, side, value):
    operands = pair(*sizes)
    factors = torch.tensor([[1.0, 0.0, 2.0], [0.0, 0.5, 1.0]])
    expected = weighted(loop(*operands), factors)
    operands[side][[1, 3], 0, 2] = value
    found, squares = sample_grad_with_norms(*operands, backend="triton")
    left_out = factors.flatten() == 0
    assert torch.equal(squares.isfinite(), ~left_out)
    assert torch.equal(squared_norms(found, sizes[1:], backend="triton").isfinite(), ~left_out)
    check_near(clipped_sum(found, factors, sizes[1:], backend="triton"), expected)


@pytest.mark.parametrize("sizes", [WHOLE[0], FACTORED[1]], ids=str)
def test_a_gradient_whose_square_overflows_has_no_finite_norm(sizes):
    left, right = pair(*sizes)
    left[2] *= 1e12
    right[2] *= 1e12
    _, squares = sample_grad_with_norms(left, right, backend="triton")
    assert squares.isfinite().tolist() == [True, True, False, True, True, True]


@pytest.mark.parametrize("sizes", [WHOLE[1], FACTORED[1]], ids=str)
def test_a_factor_that_is_not_finite_is_not_hidden(sizes):
    found = sample_grad(*pair(*sizes), backend="triton")
    factors = torch.ones(2, 3)
    factors[0, 1] = math.nan
    total = clipped_sum(found, factors, sizes[1:], backend="triton")
    assert total[0].isnan().all()
    assert total[1].isfinite().all()


@pytest.mark.parametrize("sizes", [WHOLE[1], FACTORED[3]], ids=str)
def test_two_runs_agree_bit_for_bit_and_leave_their_inputs_alone(sizes):
    left, right = pair(*sizes)
    factors = torch.tensor([[1.0, 0.0, 2.0], [0.0, 0.5, 1.0]])
    runs = []
    for _ in range(2):
        found, squares = sample_grad_with_norms(left, right, backend="triton")
        before = found.clone()
        total = clipped_sum(found, factors, sizes[1:], backend="triton")
        assert torch.equal(found, before)
        runs.append((found, squares, total))
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


@pytest.mark.parametrize("rows", [2, 6])
def test_a_record_alone_and_among_others_has_the_same_gradient_and_norm(rows):
    """Bit for bit: what a record counts does not depend on who else is in the batch."""
    for sizes in (WHOLE[0], FACTORED[1]):
        left, right = pair(*sizes, rows=rows)
        together = sample_grad_with_norms(left, right, backend="triton")
        alone = sample_grad_with_norms(left[1:2], right[1:2], backend="triton")
        assert all(torch.equal(a[1:2], b) for a, b in zip(together, alone, strict=True))


@pytest.mark.parametrize("tokens", [2, 7, 17])
@pytest.mark.parametrize("remainder", [0, -12])
def test_a_gram_norm_is_never_below_the_norm_of_what_is_summed(tokens, remainder):
    """Tokens that cancel to a remainder: the product in float32 keeps rounding errors above it."""
    m, k, rows = 48, 64, 3
    left = random(rows, tokens, m, dtype=torch.float64)
    right = random(rows, tokens, k, seed=1, dtype=torch.float64)
    right[:] = right[:, :1]
    left[:, -1] = -left[:, :-1].sum(1) + 10.0**remainder * left[:, -1]
    found, squares = sample_grad_with_norms(left.float(), right.float(), backend="triton")
    assert found.shape[-1] == m + k
    norms = squares.double().sqrt()
    summed = clipped_sum(found, torch.ones(rows, 1), (m, k), backend="triton").double()
    assert (norms >= summed.flatten(1).norm(dim=1) * (1 - 1e-6)).all()
    exact = loop(*found.split([m, k], dim=2)).flatten(1).norm(dim=1)
    sizes = left.flatten(1).norm(dim=1) * right.flatten(1).norm(dim=1)
    assert (norms <= exact * (1 + 1e-6) + 1e-5 * sizes).all()


def test_a_record_that_cancels_moves_the_sum_by_its_threshold_at_most():
    """Among others, whose own small gradients are added to its large parts."""
    m, k, tokens, records, threshold, row = 8, 96, 7, 40, 1.0, 20
    left, right = pair(tokens, m, k, rows=records)
    right[row] = right[row, :1]
    left[row, -1] = -left[row, :-1].sum(0)
    left[row] *= 1e6
    found, squares = sample_grad_with_norms(left, right, backend="triton")
    assert found.shape[-1] == m + k
    factors = (threshold / squares.sqrt()).clamp(max=1.0).unsqueeze(0)
    without = factors.clone()
    without[0, row] = 0.0
    sums = [clipped_sum(found, f, (m, k), backend="triton").double() for f in (factors, without)]
    assert (sums[0] - sums[1]).norm() <= threshold


@pytest.mark.parametrize("rows", [0, 2])
def test_nothing_to_add_up_is_zero(rows):
    """No records, and records without tokens."""
    left, right = random(rows, 0 if rows else 9, 5), random(rows, 0 if rows else 9, 37)
    found, squares = sample_grad_with_norms(left, right, backend="triton")
    assert torch.equal(squares, torch.zeros(rows))
    total = clipped_sum(found, torch.ones(2, rows // 2), (5, 37), backend="triton")
    assert torch.equal(total, torch.zeros(2, 5, 37))


def test_the_environment_asks_for_kernels_and_an_argument_goes_before(monkeypatch):
    left, right = pair(*WHOLE[0])
    kernel = sample_grad(left, right, backend="triton")
    plain = sample_grad(left, right, backend="reference")
    assert torch.equal(sample_grad(left, right), plain)
    monkeypatch.setenv("FEDSA_KERNELS", "cublas")
    assert kernel.is_contiguous()
    assert torch.equal(sample_grad(left, right), kernel)
    assert torch.equal(sample_grad(left, right, backend="reference"), plain)
    double = sample_grad(left.double(), right.double())
    assert torch.equal(double, reference.sample_grad(left.double(), right.double(), whole=False))


@pytest.mark.usefixtures("_without_type_checks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", [(4, 3, 9), (4, 9, 3), (2, 5, 9)], ids=str)
def test_ops_keep_the_rules_of_torch_library(sizes, dtype):
    check_ops(*sizes, dtype=dtype, backend="triton")
