"""Gradients of single records, against a loop over records and against Opacus' own hooks."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from opacus import GradSampleModule
from peft import get_peft_model, set_peft_model_state_dict
from private_stacks import (
    BROKEN,
    PAD,
    Rows,
    Stack,
    base_model,
    check_equal,
    make_rows,
    next_tokens,
    whole,
)
from torch import Tensor, nn

from fedsa_secure.adapters import AdaptedModel, AdapterSettings, peft_config, peft_state
from fedsa_secure.errors import PrivacyError
from fedsa_secure.federation.losses import row_losses
from fedsa_secure.types import NamedTensors, Role

SHORT, LONG = 4, 12  # of factors of rank 8 on 32 wide layers, up to six tokens are kept as factors
LORA = AdapterSettings(kind="lora", rank=8, alpha=16.0)
KINDS = {
    "lora": LORA,
    "rslora": AdapterSettings(kind="rslora", rank=4, alpha=16.0),
    "vera": AdapterSettings(kind="vera", rank=16),
}
TARGETS = {"gpt2": ("c_attn", "c_fc"), "llama": ("q_proj", "down_proj"), "t5": ("q", "v", "wo")}
_PEFT = {".lora_A.default.weight": ".A", ".lora_B.default.weight": ".B"}


def settings_of(name: str) -> AdapterSettings:
    return AdapterSettings(rank=8, target_modules=TARGETS.get(name))


def make_stack(name: str, clients: int, tokens: int, **more: object) -> Stack:
    return Stack(name, settings_of(name), clients, make_rows(name, clients * 3, tokens), **more)


@pytest.mark.parametrize("tokens", [SHORT, LONG])
@pytest.mark.parametrize("clients", [1, 4], ids=["C1", "C4"])
@pytest.mark.parametrize("kind", KINDS)
def test_they_equal_those_of_each_record_alone(kind, clients, tokens):
    stack = Stack("bert", KINDS[kind], clients, make_rows("bert", clients * 3, tokens))
    check_equal(stack.caught(), stack.alone())


@pytest.mark.parametrize("tokens", [SHORT, LONG])
@pytest.mark.parametrize("name", ["roberta", "albert", "gpt2", "llama", "t5"])
def test_they_equal_those_of_each_record_alone_on_other_models(name, tokens):
    stack = make_stack(name, 2, tokens)
    found = stack.caught()
    if name == "roberta":
        assert {"classifier.dense.weight", "classifier.out_proj.bias"} <= found.keys()
    check_equal(found, stack.alone())


@pytest.mark.parametrize("role", [Role.A, Role.B])
def test_what_is_frozen_is_not_caught(role):
    stack = make_stack("bert", 2, LONG, trained=(role,))
    found = stack.caught()
    assert {name[-1] for name in found} == {role.name}
    check_equal(found, stack.alone())


@pytest.mark.parametrize("kind", ["lora", "vera"])
def test_a_second_adapter_has_its_own(kind):
    settings = AdapterSettings(kind=kind, rank=4, private=True)
    trained = (Role.A, Role.B, Role.PRIVATE_A, Role.PRIVATE_B, Role.HEAD)
    stack = Stack("bert", settings, 2, make_rows("bert", 6, LONG), trained)
    check_equal(stack.caught(), stack.alone())


@pytest.mark.parametrize("kind", ["lora", "vera"])
def test_they_see_the_dropout_of_the_forward_pass(kind):
    """The hooks are given the input before dropout, and make the same bits again."""
    settings = AdapterSettings(kind=kind, rank=4, dropout=0.4)
    stack = Stack("bert", settings, 2, make_rows("bert", 4, LONG))
    keys, parameters = torch.arange(4, dtype=torch.int32) * 7919, stack.parameters

    def losses() -> Tensor:
        return row_losses(stack.model(stack.rows.inputs, keys), stack.rows.labels)

    with stack.step().open():
        losses().sum().backward()
        found = {name: whole(p) for name, p in parameters.items()}
    for row in range(4):
        each = torch.autograd.grad(losses()[row], list(parameters.values()))
        own = {n: g[row // 2] for n, g in zip(parameters, each, strict=True)}
        check_equal({n: g[row] for n, g in found.items()}, own)
    assert not torch.equal(losses(), stack.losses())


@contextmanager
def opacus_hooks(model: nn.Module) -> Iterator[None]:
    """Opacus' own, on layers that it knows by itself."""
    for module in model.modules():
        if any(p.requires_grad for p in module.parameters(recurse=False)):
            module.training = True
    watched = GradSampleModule(model, loss_reduction="sum", strict=False)
    with pytest.warns(UserWarning, match="Full backward hook is firing"):
        yield
    watched.remove_hooks()


def peft_samples(stack: Stack, client: int) -> NamedTensors:
    """Opacus on PEFT's model of one client, in the same order of rows. [row, …]"""
    config = peft_config(stack.model, "tiny")
    config.inference_mode, config.base_model_name_or_path = False, None
    model = get_peft_model(base_model(stack.name), config).eval()
    set_peft_model_state_dict(model, peft_state(stack.model, stack.values[client]))
    model.double()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name or "modules_to_save" in name)
    own = len(stack.rows.ids) // stack.clients
    rows = stack.rows[client * own : (client + 1) * own]
    with opacus_hooks(model):
        row_losses(model(**rows.inputs).logits, rows.labels).sum().backward()
    return {
        our_name(name): p.grad_sample for name, p in model.named_parameters() if p.requires_grad
    }


def our_name(name: str) -> str:
    found = name.removeprefix("base_model.model.").replace(".modules_to_save.default", "")
    for theirs, ours in _PEFT.items():
        found = found.replace(theirs, ours)
    return found


@pytest.mark.parametrize("tokens", [SHORT, LONG])
@pytest.mark.parametrize("kind", ["lora", "rslora"])
def test_they_equal_opacus_hooks_on_pefts_lora(kind, tokens):
    stack = Stack("bert", KINDS[kind], 2, make_rows("bert", 6, tokens))
    theirs = [peft_samples(stack, client) for client in range(2)]
    check_equal(stack.caught(), {n: torch.cat([t[n] for t in theirs]) for n in theirs[0]}, 1e-6)


class PlainVeRA(nn.Module):
    """One adapted layer in plain torch, for Opacus to differentiate with functorch."""

    def __init__(self, base: nn.Linear, A: Tensor, B: Tensor, d: Tensor, b: Tensor) -> None:
        super().__init__()
        self.inner, self.outer, self.frozen = (nn.Linear(1, 1, bias=False) for _ in range(3))
        self.inner.weight, self.outer.weight = nn.Parameter(A), nn.Parameter(B)
        self.frozen = base
        self.requires_grad_(False)
        self.d, self.b = nn.Parameter(d), nn.Parameter(b)

    def forward(self, x: Tensor) -> Tensor:
        return self.frozen(x) + self.b * self.outer(self.d * self.inner(x))


def vera_samples(stack: Stack, client: int) -> NamedTensors:
    """Opacus on a model with such layers in the places of ours. [row, …]"""
    model, values = base_model(stack.name).requires_grad_(False), stack.values[client]
    for path, layer in stack.model.layers().items():
        base = model.get_submodule(path)
        assert isinstance(base, nn.Linear)
        d, b = values[f"{path}.d"], values[f"{path}.b"]
        model.set_submodule(path, PlainVeRA(base, layer.A, layer.B, d, b))
    head = model.get_submodule("classifier")
    head.requires_grad_()
    for part in ("weight", "bias"):
        getattr(head, part).data = values[f"classifier.{part}"]
    own = len(stack.rows.ids) // stack.clients
    rows = stack.rows[client * own : (client + 1) * own]
    with opacus_hooks(model):
        row_losses(model(**rows.inputs).logits, rows.labels).sum().backward()
    return {n: p.grad_sample for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("tokens", [SHORT, LONG])
def test_they_equal_opacus_hooks_on_plain_vera(tokens):
    stack = Stack("bert", KINDS["vera"], 2, make_rows("bert", 6, tokens))
    theirs = [vera_samples(stack, client) for client in range(2)]
    check_equal(stack.caught(), {n: torch.cat([t[n] for t in theirs]) for n in theirs[0]}, 1e-6)


@pytest.mark.parametrize("tokens", [SHORT, LONG])
@pytest.mark.parametrize("clients", [1, 4], ids=["C1", "C4"])
@pytest.mark.parametrize("name", ["bert", "albert", "gpt2"])
def test_another_row_changes_no_other_rows_gradient(name, clients, tokens):
    """Also not where the other row is longer: a token mean is over a record's own tokens."""
    stack = make_stack(name, clients, tokens)
    before, other, changed = stack.caught(), stack.rows.clone(), clients * 3 - 1
    assert (other.ids[changed] == PAD).any()
    other.ids[changed] = 2 + torch.arange(tokens)
    if name == "gpt2":
        other.labels = next_tokens(other.ids)
    after = stack.caught(other)
    others = [row for row in range(clients * 3) if row != changed]
    check_equal(
        {n: g[others] for n, g in after.items()}, {n: g[others] for n, g in before.items()}, 1e-12
    )
    assert any((after[n][changed] - before[n][changed]).abs().max() > 1e-3 for n in before)


@pytest.mark.parametrize("tokens", [SHORT, LONG])
def test_a_record_that_is_not_finite_changes_no_other_rows_gradient(tokens):
    stack = make_stack("bert", 2, tokens, broken=True)
    before, other = stack.caught(), stack.rows.clone()
    other.ids[4, 1] = BROKEN
    after = stack.caught(other)
    assert all(g[4].isnan().any() for n, g in after.items() if n.endswith((".A", ".B")))
    kept = [0, 1, 2, 3, 5]
    check_equal(
        {n: g[kept] for n, g in after.items()}, {n: g[kept] for n, g in before.items()}, 1e-12
    )


def test_a_module_that_is_called_with_more_than_records_is_refused_by_name(tiny_deberta):
    """DeBERTa's keys also take the table of relative positions, which belongs to no record."""
    from fedsa_secure.adapters import attach

    settings = AdapterSettings(rank=4, target_modules=("key_proj",))
    model: AdaptedModel = attach(tiny_deberta(), settings, 0)
    model.load([model.initial], (Role.A, Role.B, Role.HEAD))
    rows = Rows(torch.randint(4, 100, (3, 6)), torch.zeros(3, dtype=torch.long))
    stack = Stack.around(model, rows)
    with stack.step().open(), pytest.raises(PrivacyError, match=r"key_proj.*1 rows.*3"):
        stack.losses().sum().backward()
    assert not any(hasattr(p, "grad_sample") for p in model.model.parameters())
