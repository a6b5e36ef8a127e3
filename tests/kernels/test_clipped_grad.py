"""The op `clipped_grad` against a loop over records in float64."""

import math

import pytest
import torch
from clipped_grad_ops import check_ops
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fedsa_kernels import clipped_sum, sample_grad, sample_grad_with_norms, squared_norms
from fedsa_kernels.clipped_grad import reference

M, K = 6, 12  # factors are kept for fewer than 72 / 18 = 4 tokens
FACTORED, SWITCH = 3, 4


def random(*sizes: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    stream = torch.Generator().manual_seed(seed)
    return torch.randn(*sizes, generator=stream, dtype=torch.float64).to(dtype)


def loop(left: Tensor, right: Tensor) -> list[Tensor]:
    """One record at a time, one token at a time."""
    return [
        sum(torch.outer(one, other) for one, other in zip(a, b, strict=True))
        for a, b in zip(left.double(), right.double(), strict=True)
    ]


def check_near(actual: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    assert actual.shape == expected.shape
    assert torch.allclose(actual.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("clients", [1, 4], ids=["C1", "C4"])
@pytest.mark.parametrize("sizes", [(M, K), (K, M), (M, M), (1, K)], ids=str)
@pytest.mark.parametrize("tokens", [1, 2, FACTORED, SWITCH, 5, 20])
def test_norms_and_sums_equal_a_loop_over_records(tokens, sizes, clients):
    m, k = sizes
    left, right = random(clients * 3, tokens, m), random(clients * 3, tokens, k, seed=1)
    factors = random(clients, 3, seed=2).abs()
    each = loop(left, right)
    found = sample_grad(left, right)
    check_near(squared_norms(found, sizes), torch.stack([g.square().sum() for g in each]), 1e-9)
    weighted = torch.stack([f * g for f, g in zip(factors.flatten(), each, strict=True)])
    check_near(clipped_sum(found, factors, sizes), weighted.view(clients, 3, m, k).sum(1))


@pytest.mark.parametrize("sizes", [(M, K), (K, M)], ids=str)
def test_what_is_kept_is_the_smaller_and_a_sum_of_gradients_is_always_whole(sizes):
    m, k = sizes
    for tokens in range(1, 9):
        left, right = random(2, tokens, m), random(2, tokens, k, seed=1)
        kept, whole = sample_grad(left, right), sample_grad(left, right, whole=True)
        assert kept.numel() == 2 * min(m * k, tokens * (m + k))
        assert (kept.shape[-1] == m + k) == (tokens <= FACTORED)
        check_near(whole, torch.stack(loop(left, right)))


@pytest.mark.parametrize("tokens", [1, FACTORED, SWITCH, 9])
def test_factors_and_the_whole_agree(tokens):
    left, right = random(8, tokens, M), random(8, tokens, K, seed=1)
    factors = random(4, 2, seed=2)
    pair = [sample_grad(left, right, whole) for whole in (False, True)]
    norms = [squared_norms(found, (M, K)) for found in pair]
    sums = [clipped_sum(found, factors, (M, K)) for found in pair]
    check_near(norms[0], norms[1], 1e-9)
    check_near(sums[0], sums[1])


@pytest.mark.parametrize("tokens", [FACTORED, SWITCH])
def test_norms_in_the_same_pass_are_those_of_what_is_returned(tokens):
    left, right = random(4, tokens, M), random(4, tokens, K, seed=1)
    found, squares = sample_grad_with_norms(left, right)
    assert torch.equal(found, sample_grad(left, right))
    check_near(squares, torch.stack([g.square().sum() for g in loop(left, right)]), 1e-9)


@pytest.mark.parametrize("shape", [(), (5,), (2, 3, 4)], ids=str)
def test_parameters_that_are_no_matrices(shape):
    gradients, factors = random(6, *shape), random(2, 3, seed=1)
    expected = torch.stack([g.square().sum() for g in gradients])
    check_near(squared_norms(gradients, shape), expected)
    weighted = gradients * factors.reshape(6, *[1] * len(shape))
    check_near(clipped_sum(gradients, factors, shape), weighted.view(2, 3, *shape).sum(1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("tokens", [FACTORED, 9])
def test_half_precision_is_worked_off_in_single(tokens, dtype):
    left, right = random(4, tokens, M, dtype=dtype), random(4, tokens, K, seed=1, dtype=dtype)
    found = sample_grad(left, right)
    assert found.dtype == torch.float32
    each = torch.stack(loop(left, right))
    check_near(squared_norms(found, (M, K)), each.square().sum((1, 2)), 1e-5)
    check_near(clipped_sum(found, torch.ones(1, 4), (M, K)), each.sum(0, keepdim=True), 1e-5)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("clients", [1, 4], ids=["C1", "C4"])
@pytest.mark.parametrize("tokens", [FACTORED, 9])
def test_factor_zero_takes_a_record_out_whatever_its_gradient_is(tokens, clients, value):
    left, right = random(clients * 3, tokens, M), random(clients * 3, tokens, K, seed=1)
    factors = torch.ones(clients, 3, dtype=torch.float64)
    factors[:, 1] = 0.0
    without = [g.sum(0) for g in torch.stack(loop(left, right)).view(clients, 3, M, K)[:, [0, 2]]]
    for place in (left, right):
        spoilt = place.clone()
        place.view(clients, 3, tokens, -1)[:, 1, 0, 2] = value
        found = sample_grad(left, right)
        assert not squared_norms(found, (M, K)).view(clients, 3)[:, 1].isfinite().any()
        check_near(clipped_sum(found, factors, (M, K)), torch.stack(without))
        place.copy_(spoilt)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_factor_zero_takes_out_what_is_no_matrix(value):
    gradients = random(3, 5)
    gradients[1, 2] = value
    factors = torch.tensor([[1.0, 0.0, 2.0]], dtype=torch.float64)
    expected = gradients[0] + 2 * gradients[2]
    check_near(clipped_sum(gradients, factors, (5,)), expected.unsqueeze(0))


@given(
    tokens=st.integers(2, 7),
    seed=st.integers(0, 2**31),
    scale=st.integers(-9, 9),
    remainder=st.integers(-12, 0),
    rows=st.integers(1, 3),
)
def test_a_gram_norm_is_never_below_the_norm_of_what_is_summed(
    tokens, seed, scale, remainder, rows
):
    """Tokens that cancel to a remainder: the product in float32 keeps rounding errors above it."""
    m, k = 24, 48
    left = random(rows, tokens, m, seed=seed) * 10.0**scale
    right = random(rows, tokens, k, seed=seed + 1)
    right[:, -1] = right[:, 0]
    left[:, -1] = -left[:, :-1].sum(1) + 10.0 ** (scale + remainder) * left[:, -1]
    right[:, 1:-1] = right[:, :1]
    found = sample_grad(left.float(), right.float())
    assert found.shape[-1] == m + k
    norms = squared_norms(found, (m, k)).double().sqrt()
    summed = clipped_sum(found.clone(), torch.ones(rows, 1), (m, k)).double()
    true = summed.flatten(1).norm(dim=1)
    assert (norms >= true * (1 - 1e-6)).all()
    exact = torch.stack(loop(*found.split([m, k], dim=2))).flatten(1).norm(dim=1)
    sizes = left.flatten(1).norm(dim=1) * right.flatten(1).norm(dim=1)
    assert (norms <= exact * (1 + 1e-6) + 1e-5 * sizes).all()


@pytest.mark.parametrize("records", [16, 1000])
@pytest.mark.parametrize("tokens", [2, 7])
@pytest.mark.parametrize("place", [0, 0.5, 1])
def test_a_record_that_cancels_moves_the_sum_by_its_threshold_at_most(place, tokens, records):
    """Also in float32 and among others, whose own small gradients are added to its large parts."""
    m, k, threshold, row = 8, 384, 1.0, int(place * (records - 1))
    left = random(records, tokens, m, dtype=torch.float32)
    right = random(records, tokens, k, seed=1, dtype=torch.float32)
    right[row] = right[row, :1]
    left[row, -1] = -left[row, :-1].sum(0)
    left[row] *= 1e6
    found = sample_grad(left, right)
    assert found.shape[-1] == m + k
    factors = (threshold / squared_norms(found, (m, k)).sqrt()).clamp(max=1.0).unsqueeze(0)
    without = factors.clone()
    without[0, row] = 0.0
    sums = [clipped_sum(found.clone(), each, (m, k)).double() for each in (factors, without)]
    assert (sums[0] - sums[1]).norm() <= threshold
    assert (
        loop(left[row : row + 1], right[row : row + 1])[0].norm()
        < squared_norms(found, (m, k))[row].double().sqrt()
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(5,), (M, K)], ids=str)
def test_gradients_kept_in_half_precision_are_squared_and_summed_in_single(shape, dtype):
    """In float16 a square overflows above 255, and a thousand ones and a half add up to 1536."""
    gradients = random(3, *shape, dtype=dtype) * 300
    wide = gradients.double()
    check_near(squared_norms(gradients, shape), wide.flatten(1).square().sum(1), 1e-6)
    many = torch.full((1000, *shape), 1.5, dtype=dtype)
    found = clipped_sum(many, torch.full((1, 1000), 2.0**-26), shape)
    assert found.dtype == dtype
    check_near(found.double() * 2**26, torch.full((1, *shape), 1500.0).double(), 1e-2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_factors_kept_in_half_precision_are_squared_and_summed_in_single(dtype):
    kept = torch.cat([random(4, 2, M) * 300, random(4, 2, K, seed=1)], dim=2).to(dtype)
    each = torch.stack(loop(*kept.split([M, K], dim=2)))
    squares = squared_norms(kept, (M, K))
    exact = each.square().sum((1, 2))
    assert ((squares >= exact * (1 - 1e-6)) & squares.isfinite()).all()
    found = clipped_sum(kept, torch.full((1, 4), 1e-3), (M, K))
    assert found.dtype == dtype
    check_near(found, each.sum(0, keepdim=True) * 1e-3, 1e-2)


class _Products(TorchDispatchMode):
    """The dtypes of all operands of matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "mm" in func.overloadpacket.__name__ or "mv" in func.overloadpacket.__name__:
            self.dtypes |= {x.dtype for x in args if isinstance(x, Tensor)}
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("tokens", [FACTORED, SWITCH])
def test_no_switch_can_make_a_sum_coarser_than_its_norms(tokens):
    """TF32 and bfloat16 are for products of float32 matrices, and there is none."""
    left = random(6, tokens, M, dtype=torch.float32)
    right = random(6, tokens, K, seed=1, dtype=torch.float32)
    with _Products() as making:  # below the ops, which hide what they do
        reference.sample_grad(left, right, True)
    assert making.dtypes == {torch.float32}  # products are seen
    found = sample_grad(left, right)
    with _Products() as adding:
        reference.squared_norms(found, (M, K))
        reference.clipped_sum(found, torch.ones(2, 3), (M, K))
    assert adding.dtypes <= {torch.float64}


@pytest.mark.parametrize("tokens", [FACTORED, SWITCH])
def test_inputs_are_left_alone(tokens):
    found = sample_grad(random(6, tokens, M), random(6, tokens, K, seed=1))
    found[1, 0, 0] = math.nan
    before = found.clone()
    squared_norms(found, (M, K))
    clipped_sum(found, torch.tensor([[1.0, 0.0, 2.0], [0.0, 0.5, 1.0]]), (M, K))
    assert torch.equal(found.nan_to_num(7.0), before.nan_to_num(7.0))


@pytest.mark.usefixtures("_without_type_checks")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("sizes", [(FACTORED, M, K), (SWITCH, K, M)], ids=str)
def test_ops_keep_the_rules_of_torch_library(sizes, dtype):
    check_ops(*sizes, dtype=dtype, backend=None)


@pytest.mark.usefixtures("_without_type_checks")
def test_operands_that_do_not_fit_are_refused():
    """A kernel would read what is beside them in memory, which may be another record's."""
    left, right = random(5, 4, M), random(5, 4, K)
    for op in (sample_grad, sample_grad_with_norms):
        for other in (right[:4], right[:, :3]):
            with pytest.raises(ValueError, match="right is .* and not"):
                op(left, other)
    found = sample_grad(left, right)
    with pytest.raises(ValueError, match="6 factors for 5 records"):
        clipped_sum(found, torch.ones(2, 3), (M, K))
    for op in (squared_norms, lambda g, shape: clipped_sum(g, torch.ones(1, 5), shape)):
        for gradients, shape in ((found, (M, K + 1)), (torch.zeros(5, M + K), (M, K))):
            with pytest.raises(ValueError, match="gradients is .* and not"):
                op(gradients, shape)
    with pytest.raises(ValueError, match=r"factors are \[5\], and not \[client, own\]"):
        clipped_sum(found, torch.ones(5), (M, K))
    with pytest.raises(ValueError, match="left is .*; it needs records, tokens and columns"):
        sample_grad(left[0], right)


@pytest.mark.usefixtures("_without_type_checks")
@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64], ids=str)
def test_other_numbers_are_refused(dtype):
    left, right = random(5, 4, M), random(5, 4, K)
    found, factors = sample_grad(left, right), torch.ones(1, 5)
    for call in (
        lambda: sample_grad(left, right.to(dtype)),
        lambda: sample_grad_with_norms(left.to(dtype), right),
        lambda: squared_norms(found.to(dtype), (M, K)),
        lambda: clipped_sum(found.to(dtype), factors, (M, K)),
        lambda: clipped_sum(found, factors.to(dtype), (M, K)),
    ):
        with pytest.raises(ValueError, match=f"is {dtype}, and not float16"):
            call()


def test_operands_on_two_devices_are_refused():
    """The op would run on neither, and hand out memory that nothing was written to."""
    left, right = random(5, 4, M), random(5, 4, K)
    found, factors = sample_grad(left, right), torch.ones(1, 5)
    for call in (
        lambda: sample_grad(left, right.to("meta")),
        lambda: sample_grad_with_norms(left.to("meta"), right),
        lambda: clipped_sum(found, factors.to("meta"), (M, K)),
    ):
        with pytest.raises(ValueError, match=r"is on (cpu|meta), and .* on (meta|cpu)"):
            call()


@pytest.mark.parametrize("tokens", [FACTORED, SWITCH])
def test_one_side_may_be_in_double_precision(tokens):
    left, right = random(3, tokens, M), random(3, tokens, K, dtype=torch.float32)
    found = sample_grad(left, right)
    assert found.dtype == torch.float64
    assert torch.equal(found, sample_grad(left, right.double()))


def test_clients_without_records():
    for gradients in (torch.zeros(0, M, K), torch.zeros(0, 2, M + K)):
        assert not clipped_sum(gradients, torch.ones(3, 0), (M, K)).any()
