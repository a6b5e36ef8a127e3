"""The Triton kernels of the adapter ops in the interpreter, against autograd in float64."""

import itertools
from dataclasses import replace

import pytest
import torch
from adapter_cases import (
    Case,
    VeraCase,
    check_equal_to_plain,
    check_near,
    check_no_rows,
    lora_case,
    vera_case,
)
from torch.utils.checkpoint import checkpoint

from fedsa_kernels import lora_linear
from fedsa_kernels.dispatch import choose
from fedsa_kernels.launch import Tile, interpreted
from fedsa_kernels.tables import Measured, Problem, Table, in_force

pytestmark = pytest.mark.skipif(not interpreted(), reason="needs TRITON_INTERPRET=1")

TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 4e-2}
"""Half precision is twice as coarse as on a device: the interpreter cuts bits off."""
BACKENDS = ("cublas", "fused")
CPU = torch.device("cpu")
MAKERS = {"lora": lora_case, "vera": vera_case}
SIZES = [(37, 23, 5), (64, 64, 16), (130, 70, 1), (48, 100, 33)]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=MAKERS)
def make(request: pytest.FixtureRequest):
    return MAKERS[request.param]


@pytest.fixture(autouse=True)
def _outputs_start_as_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a kernel forgets to write shows."""
    empty = torch.Tensor.new_empty

    def poisoned(tensor: torch.Tensor, *sizes, **options) -> torch.Tensor:
        made = empty(tensor, *sizes, **options)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)


@pytest.mark.parametrize("dropout", [False, True], ids=["plain", "dropout"])
@pytest.mark.parametrize("clients", [1, 3], ids=["C1", "C3"])
@pytest.mark.parametrize("sizes", SIZES, ids=lambda s: "x".join(map(str, s)))
def test_output_and_all_gradients_equal_plain_autograd(make, backend, sizes, clients, dropout):
    case = make(clients=clients, sizes=sizes, dropout=dropout, dtype=torch.float32)
    check_equal_to_plain(case, TOLERANCE[torch.float32], backend=backend)


@pytest.mark.parametrize("weight", [True, False], ids=["weight", "branch-alone"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_with_and_without_frozen_weight_and_bias(make, backend, weight, bias):
    case = make(weight=weight, bias=bias, dropout=True, dtype=torch.float32)
    check_equal_to_plain(case, TOLERANCE[torch.float32], backend=backend)


@pytest.mark.parametrize("rank", [100, 256])
def test_large_ranks(make, backend, rank):
    options = {"sizes": (40, 56, rank), "clients": 2, "shape": (2, 17)}
    case = make(**options, dropout=True, dtype=torch.float32)
    check_equal_to_plain(case, TOLERANCE[torch.float32], backend=backend)


@pytest.mark.parametrize("rows", [1, 65, 128])
def test_segments_of_any_length(make, backend, rows):
    case = make(clients=2, shape=(2 * rows,), dropout=True, dtype=torch.float32)
    check_equal_to_plain(case, TOLERANCE[torch.float32], backend=backend)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_half_precision(make, backend, dtype):
    case = make(dropout=True, dtype=dtype)
    # Half precision ends at 65504; sums of squares of what was drawn do not.
    case = type(case)(**{**vars(case), "B": (case.B.detach() / 16).requires_grad_()})
    check_equal_to_plain(case, TOLERANCE[dtype], backend=backend)


def test_autocast_makes_the_products_in_half_precision(make, backend):
    case = make(dropout=True, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = case.run(backend=backend)
        check_equal_to_plain(case, TOLERANCE[torch.bfloat16], backend=backend)
    halved = {
        name: value.detach().bfloat16() if value.is_floating_point() else value
        for name, value in vars(case).items()
    }
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, type(case)(**halved).run(backend=backend))


def test_what_a_checkpoint_computes_again_is_the_same(make, backend):
    case, found = make(dropout=True, dtype=torch.float32), []
    runs = []

    def run(x: torch.Tensor) -> torch.Tensor:
        runs.append(x)
        return type(case)(**{**vars(case), "x": x}).run(backend=backend)

    for kept in (True, False):
        y = run(case.x) if kept else checkpoint(run, case.x, use_reentrant=False)
        found.append([y, *torch.autograd.grad(y.square().sum(), case.trained)])
    assert len(runs) == 3
    for plain, again in zip(*found, strict=True):
        assert torch.equal(plain, again)


@pytest.mark.parametrize("needs", itertools.product([True, False], repeat=3))
def test_frozen_inputs_get_no_gradient_and_change_no_other(make, backend, needs):
    case: Case = make(needs=needs, dropout=True, dtype=torch.float32)
    expected, gradients = case.plain()
    y = case.run(backend=backend)
    assert (y.detach().double() - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert y.requires_grad == any(needs)
    if any(needs):
        y.square().sum().backward()
    for tensor, needed, gradient in zip(case.trained, needs, gradients, strict=True):
        assert (tensor.grad is not None) == needed
        if needed:
            error = (tensor.grad.double() - gradient).abs().max()
            assert error <= 1e-5 * gradient.abs().max()


def test_x_may_be_a_view(make, backend):
    case = make(dropout=True, dtype=torch.float32)
    wide = torch.randn(6, 7, 2 * 37)
    views = (wide[..., ::2], wide[..., 5:42], wide[..., :37].flip(1))
    for view in views:
        own = type(case)(**{**vars(case), "x": view.requires_grad_()})
        check_equal_to_plain(own, TOLERANCE[torch.float32], backend=backend)


@pytest.mark.parametrize(
    "change",
    [
        {"both": None},
        {"fused": None},
        {"shrink": Tile(m=16, n=16, splits=3), "factor": Tile(m=16, n=32, splits=4)},
        {"both": Tile(m=16, n=16, splits=2)},
    ],
    ids=["two-passes", "narrow-first", "parts", "parts-of-both"],
)
def test_tiles_change_no_result(make, backend, change):
    """A table may say that two passes are faster than one, or how a sum is split."""
    case = make(shape=(6, 50), sizes=(70, 90, 5), dropout=True, dtype=torch.float32)
    op = "vera_linear" if isinstance(case, VeraCase) else "lora_linear"
    problem = Problem(op, torch.float32, 300, 70, 90, 5, 3)
    tiles = replace(problem.default_tiles, **change)
    with in_force(Table((Measured(problem, backend, tiles),))):
        assert choose(problem, CPU, backend).tiles == tiles
        check_equal_to_plain(case, TOLERANCE[torch.float32], backend=backend)


def spread(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers with a gap after each."""
    wide = tensor.detach().new_zeros(*tensor.shape, 2)
    wide[..., 0] = tensor.detach()
    return wide[..., 0].requires_grad_(tensor.requires_grad)


def test_operands_may_have_gaps(make, backend):
    case = make(dropout=True, dtype=torch.float32)
    own = {name: None if t is None else spread(t) for name, t in vars(case).items()}
    check_equal_to_plain(type(case)(**own), TOLERANCE[torch.float32], backend=backend)


def test_what_kernels_cannot_do_falls_to_the_reference(make, backend):
    """Float64, which they do not have, and a batch without rows."""
    check_equal_to_plain(make(dropout=True), 1e-12, backend=backend)
    check_no_rows(make, backend)


def test_two_runs_agree_bit_for_bit(make, backend):
    results = []
    for _ in range(2):
        case = make(shape=(3, 90), dropout=True, dtype=torch.float32)
        y = case.run(backend=backend)
        results.append([y, *torch.autograd.grad(y.square().sum(), case.trained)])
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


@pytest.mark.usefixtures("_without_type_checks")
@pytest.mark.parametrize("needs", [(True, True, True), (False, True, False)], ids=["all", "one"])
def test_ops_keep_the_rules_of_torch_library(make, backend, needs):
    sizes, clients = (20, 17, 3), 2 if all(needs) else 1
    case = make(
        clients=clients, shape=(4,), sizes=sizes, dropout=True, dtype=torch.float32, needs=needs
    )
    case.check_ops(backend, needs)


@pytest.mark.parametrize(("scaling", "outer"), [(2.0, 1e-3), (40.0, 1e-3), (0.01, 1.3e-5)])
def test_float16_leaves_its_range_in_no_backend_alone(scaling: float, outer: float, backend: str):
    """q is about 2,000 here, and B makes it small again."""
    x = torch.full((16, 64), 8.0, dtype=torch.float16)
    weight, A = torch.zeros(16, 64, dtype=torch.float16), torch.full((1, 3, 64), 4.0).half()
    B = torch.full((1, 16, 3), outer, dtype=torch.float16)
    wide_x, wide_weight, wide_a, wide_b = (each.double() for each in (x, weight, A, B))
    expected = lora_linear(wide_x, wide_weight, None, wide_a, wide_b, scaling)
    check_near(lora_linear(x, weight, None, A, B, scaling, backend=backend), expected, 4e-3)
