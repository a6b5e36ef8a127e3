"""Ops in eager mode: what autograd sees of them, whatever the dimensions of x."""

from dataclasses import fields, replace

import pytest
import torch
from adapter_cases import (
    Case,
    VeraCase,
    check_equal_to_plain,
    check_near,
    lora_case,
    vera_case,
)

from fedsa_kernels import lora_linear, vera_linear

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


@pytest.mark.parametrize("case_of", CASES.values(), ids=CASES)
def test_gradients_have_the_dtypes_of_the_forward_pass_wherever_they_are_made(case_of):
    """As those of torch's own layers, that are called outside of autocast."""
    case = case_of(dtype=torch.float32, dropout=True)
    y = case.run()
    expected = torch.autograd.grad(y.sum(), case.trained, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(y.sum(), case.trained)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("case_of", CASES.values(), ids=CASES)
def test_autocast_leaves_float64_alone(case_of):
    case = case_of(dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        y = case.run()
    assert torch.equal(y, case.run())


@pytest.mark.parametrize("p", [-0.5, 1.0, 1.5, float("nan")])
@pytest.mark.parametrize(("op", "case_of"), [(lora_linear, lora_case), (vera_linear, vera_case)])
def test_dropout_that_is_no_probability_is_refused(op, case_of, p):
    case = case_of(dropout=True)
    operands = [getattr(case, each.name) for each in fields(case) if each.name != "keys"]
    operands += [1.0] if op is lora_linear else []
    with pytest.raises(ValueError, match=r"dropout is a probability in \[0, 1\), not"):
        op(*operands, dropout=p, keys=case.keys)


@pytest.mark.parametrize("count", [1, 3, 43])
@pytest.mark.parametrize("case_of", CASES.values(), ids=CASES)
def test_another_number_of_keys_than_vectors_is_refused(case_of, count):
    """One key for all would give every vector the same mask."""
    case = replace(case_of(shape=(6, 7)), keys=torch.zeros(count, dtype=torch.int32))
    with pytest.raises(ValueError, match=f"{count} dropout keys for 42 vectors of x"):
        case.run()


@pytest.mark.usefixtures("_without_type_checks")
@pytest.mark.parametrize("backend", [None, "fused"])
@pytest.mark.parametrize(
    ("changed", "named"),
    [
        (lambda k: replace(k, weight=k.weight[:8]), "weight"),
        (lambda k: replace(k, weight=torch.zeros(23, 50)), "weight"),
        (lambda k: replace(k, bias=torch.zeros(40)[:5]), "bias"),
        (lambda k: replace(k, bias=torch.zeros(1)), "bias"),
        (lambda k: replace(k, A=k.A[..., :10]), "A"),
        (lambda k: replace(k, B=k.B[..., :3]), "B"),
        (lambda k: replace(k, **first_client(k)), "B|b"),
    ],
)
@pytest.mark.parametrize("case_of", CASES.values(), ids=CASES)
def test_shapes_that_do_not_fit_are_refused_by_name(case_of, changed, named, backend):
    """Plain torch would repeat what has one row, and a kernel read what is beside the operand."""
    with pytest.raises(ValueError, match=f"_linear: ({named}) is .* and not "):
        changed(case_of(clients=2)).run(backend=backend)


@pytest.mark.usefixtures("_without_type_checks")
@pytest.mark.parametrize("backend", [None, "fused"])
@pytest.mark.parametrize("case_of", CASES.values(), ids=CASES)
def test_factors_without_clients_are_refused_by_name(case_of, backend):
    case = case_of(clients=2)
    name = "b" if isinstance(case, VeraCase) else "B"
    factor = getattr(case, name)
    for wrong in (factor[0], factor[:0], factor[..., :0], factor[..., None]):
        with pytest.raises(ValueError, match=rf"_linear: {name} is .* axes, the first of clients"):
            replace(case, **{name: wrong}).run(backend=backend)


@pytest.mark.usefixtures("_without_type_checks")
@pytest.mark.parametrize("case_of", CASES.values(), ids=CASES)
@pytest.mark.parametrize("x", [torch.tensor(1.0), torch.zeros(3, 0)], ids=["number", "empty"])
def test_an_x_without_vectors_is_refused(case_of, x):
    with pytest.raises(ValueError, match=r"_linear: x is \[.*\], and holds no vectors"):
        replace(case_of(), x=x, keys=None).run()


@pytest.mark.usefixtures("_without_type_checks")
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn])
@pytest.mark.parametrize("case_of", CASES.values(), ids=CASES)
def test_an_x_of_other_numbers_is_refused(case_of, dtype, autocast):
    """Weights that are rounded to integers make outputs that look like such."""
    case = case_of(dtype=torch.float32)
    case = replace(case, x=case.x.detach().to(dtype))
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
        pytest.raises(ValueError, match=f"x is {dtype}, and not float16"),
    ):
        case.run()


@pytest.mark.usefixtures("_without_type_checks")
@pytest.mark.parametrize("case_of", CASES.values(), ids=CASES)
def test_codes_of_a_quantised_weight_are_refused(case_of):
    case = case_of()
    with pytest.raises(
        ValueError, match=r"an operand of shape \[.*\] is torch.int8, and not float16"
    ):
        replace(case, weight=case.weight.to(torch.int8)).run()


@pytest.mark.parametrize("case_of", CASES.values(), ids=CASES)
def test_rows_are_split_over_clients_and_not_their_vectors(case_of):
    """Three rows of two tokens are six vectors, but two clients cannot share the second row."""
    with pytest.raises(ValueError, match="3 rows do not split into 2 client segments"):
        case_of(clients=2, shape=(3, 2)).run()


@pytest.mark.usefixtures("_without_type_checks")
@pytest.mark.parametrize("case_of", CASES.values(), ids=CASES)
def test_operands_on_two_devices_are_refused(case_of):
    """A kernel takes an address of another device for one of its own."""
    case = case_of(dropout=True)
    with pytest.raises(ValueError, match="x is on meta, and an operand of shape .* on cpu"):
        replace(case, x=case.x.detach().to("meta")).run()
    with pytest.raises(ValueError, match="x is on cpu, and an operand of shape .* on meta"):
        replace(case, weight=case.weight.to("meta")).run()
    with pytest.raises(ValueError, match="dropout keys are on meta, and x on cpu"):
        replace(case, keys=case.keys.to("meta")).run()


@pytest.mark.usefixtures("_without_type_checks")
@pytest.mark.parametrize("case_of", CASES.values(), ids=CASES)
def test_the_meta_device_gives_shapes(case_of):
    case = case_of()
    tensors = {each.name: getattr(case, each.name) for each in fields(case)}
    on_meta = {name: None if t is None else t.to("meta") for name, t in tensors.items()}
    away = replace(case, **on_meta)
    y = away.run()
    assert (y.is_meta, y.shape) == (True, case.run().shape)
    gradients = torch.autograd.grad(y.sum(), away.trained)
    assert [each.shape for each in gradients] == [each.shape for each in case.trained]


def first_client(case: Case) -> dict[str, torch.Tensor]:
    """The outer factor of one client, where x has rows of two."""
    return {"b": case.b[:1]} if isinstance(case, VeraCase) else {"B": case.B[:1]}


@pytest.mark.usefixtures("_without_type_checks")
@pytest.mark.parametrize("dtype", [torch.int64, torch.int16])
def test_keys_of_other_words_are_refused(dtype):
    """Half of the elements would be dropped, whatever the probability is."""
    case = lora_case(dropout=True)
    with pytest.raises(ValueError, match="dropout keys are words of 32 bits, int32, not"):
        replace(case, keys=case.keys.to(dtype)).run()
