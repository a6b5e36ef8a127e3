"""The kernels of `lora_linears` in the interpreter, against autograd in float64."""

import itertools
from dataclasses import replace

import pytest
import torch
from adapter_cases import SCALING
from linears_cases import GROUPED_QUERIES, LinearsCase, check_linears, linears_case, loss

from fedsa_kernels.launch import interpreted

pytestmark = pytest.mark.skipif(not interpreted(), reason="needs TRITON_INTERPRET=1")

TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 4e-2}
"""Half precision is twice as coarse as on a device: the interpreter cuts bits off."""


@pytest.fixture(params=["cublas", "fused"])
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(autouse=True)
def _outputs_start_as_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a kernel forgets to write shows."""
    empty = torch.Tensor.new_empty

    def poisoned(tensor: torch.Tensor, *sizes, **options) -> torch.Tensor:
        made = empty(tensor, *sizes, **options)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)


SIZES = [
    (37, GROUPED_QUERIES),
    (64, ((64, 16), (32, 16), (32, 16))),
    (130, ((70, 1), (20, 33))),
    (40, ((20, 100), (24, 156))),
]


@pytest.mark.parametrize("clients", [1, 3], ids=["C1", "C3"])
@pytest.mark.parametrize(("d_in", "sizes"), SIZES)
def test_outputs_and_all_gradients_equal_plain_autograd(backend, d_in, sizes, clients):
    case = linears_case(clients=clients, d_in=d_in, sizes=sizes, dtype=torch.float32)
    check_linears(case, TOLERANCE[torch.float32], backend=backend)


@pytest.mark.parametrize("rows", [1, 65])
def test_segments_of_any_length(backend, rows):
    case = linears_case(clients=2, shape=(2 * rows,), dtype=torch.float32)
    check_linears(case, TOLERANCE[torch.float32], backend=backend)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_half_precision(backend, dtype):
    # Half precision ends at 65504; sums of squares of smaller numbers do not.
    case = linears_case(dtype=dtype, scale=0.25)
    check_linears(case, TOLERANCE[dtype], backend=backend)


MIXED = [(True, False, True, True, False), (False, False, False, False, True)]


@pytest.mark.parametrize(
    "needs", [(x, a, a, b, b) for x, a, b in itertools.product([True, False], repeat=3)] + MIXED
)
def test_any_of_the_gradients_may_be_left_out(backend, needs):
    case = linears_case(needs=needs, sizes=GROUPED_QUERIES[:2], dtype=torch.float32)
    check_linears(case, TOLERANCE[torch.float32], backend=backend)


def test_x_may_be_a_view(backend):
    case = linears_case(dtype=torch.float32)
    x = torch.randn(6, 7, 2 * 37)[..., ::2].requires_grad_()
    layers = tuple(replace(each, x=x) for each in case.layers)
    check_linears(LinearsCase(layers), TOLERANCE[torch.float32], backend=backend)


def test_two_runs_agree_bit_for_bit(backend):
    results = []
    for _ in range(2):
        case = linears_case(shape=(3, 40), sizes=GROUPED_QUERIES[:2], dtype=torch.float32)
        ys = case.run(backend=backend)
        results.append([*ys, *torch.autograd.grad(loss(ys), case.trained)])
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


@pytest.mark.usefixtures("_without_type_checks")
def test_op_keeps_the_rules_of_torch_library(backend):
    case = linears_case(shape=(6,), sizes=GROUPED_QUERIES[:2], dtype=torch.float32)
    biases = [torch.zeros(0) if each.bias is None else each.bias for each in case.layers]
    A = torch.cat([each.A for each in case.layers], 1).detach().requires_grad_()
    weights, Bs = ([getattr(each, name) for each in case.layers] for name in ("weight", "B"))
    inputs = (case.x, weights, biases, A, Bs, SCALING, backend)
    torch.library.opcheck(torch.ops.fedsa.lora_linears.default, inputs)
