"""Layers that take the same x, computed together: the numbers of each alone, never stale ones."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from families import FAMILIES, Family, loss, random_client
from jaxtyping import config as jaxtyping_config
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import GenerationConfig

from fedsa_kernels import row_keys
from fedsa_secure.adapters import (
    AdaptedModel,
    AdapterSettings,
    BatchContext,
    LoRALinear,
    Siblings,
    attach,
)
from fedsa_secure.adapters import siblings as module
from fedsa_secure.privacy.watching import watched
from fedsa_secure.types import NamedTensors, Role

TARGETS = {
    "bert": ("query", "key", "value", "dense"),
    "llama": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "gpt2": ("c_attn", "c_fc"),
    "t5": ("q", "k", "v", "o", "wi", "wo"),
}
TOGETHER = {"bert": 2 * [3], "llama": 2 * [3, 2], "gpt2": [], "t5": 4 * [3] + 2 * [2]}
"""How many layers are computed together, in the two layers of each stack: attention, gate and up.

In T5's cross-attention keys and values are made of the encoder's output: q is apart, they are not.
"""


@pytest.fixture
def _without_type_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The checker of these tests cannot be compiled."""
    monkeypatch.setattr(jaxtyping_config, "jaxtyping_disable", True)


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many layers each call of the op computes together."""
    made: list[int] = []
    op = module.lora_linears

    def counted(x: Tensor, weights: list[Tensor], *rest: object) -> tuple[Tensor, ...]:
        made.append(len(weights))
        return op(x, weights, *rest)

    monkeypatch.setattr(module, "lora_linears", counted)
    return made


def adapted_model(name: str, clients: int = 1, **options: object) -> AdaptedModel:
    settings = AdapterSettings(rank=4, target_modules=TARGETS[name], **options)
    adapted = attach(FAMILIES[name].make(), settings, seed=0)
    adapted.load([random_client(adapted, k) for k in range(clients)], trained=set(Role))
    return adapted


def apart(adapted: AdaptedModel) -> AdaptedModel:
    """The same model with every layer alone."""
    for layer in adapted.layers().values():
        layer.shared = None
    return adapted


def inputs_of(name: str, clients: int = 1) -> dict[str, Tensor]:
    family: Family = FAMILIES[name]
    return {key: values.repeat(clients, 1) for key, values in family.inputs().items()}


def step(adapted: AdaptedModel, inputs: dict[str, Tensor], keys: Tensor | None = None) -> list:
    """Logits, and the gradients of everything that is trained."""
    logits = adapted(inputs, keys)
    return [logits.detach(), *torch.autograd.grad(loss(logits), list(trained(adapted).values()))]


def trained(adapted: AdaptedModel) -> NamedTensors:
    return adapted.parameters(set(Role))


def check_same(actual: list[Tensor], expected: list[Tensor]) -> None:
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=1e-4)


# --- the same numbers ------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointed", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize("private", [False, True], ids=["", "private"])
@pytest.mark.parametrize("clients", [1, 3])
@pytest.mark.parametrize("name", TARGETS)
def test_outputs_and_all_gradients_are_those_of_each_layer_alone(
    name, clients, private, checkpointed, counts
):
    inputs = inputs_of(name, clients)
    expected = step(apart(adapted_model(name, clients, private=private)), inputs)
    adapted = adapted_model(name, clients, private=private)
    if checkpointed:
        adapted.checkpoint_gradients()
    check_same(step(adapted, inputs), expected)
    assert sorted(counts) == sorted(TOGETHER[name] * (2 if checkpointed else 1))


def test_without_gradients(counts):
    inputs = inputs_of("llama")
    expected, adapted = apart(adapted_model("llama"))(inputs), adapted_model("llama")
    with torch.no_grad():
        torch.testing.assert_close(adapted(inputs), expected, atol=2e-6, rtol=1e-4)
    assert counts == TOGETHER["llama"]


def test_frozen_factors_and_new_clients_between_batches(counts):
    inputs, adapted, alone = inputs_of("bert"), adapted_model("bert"), apart(adapted_model("bert"))
    for roles in ({Role.A}, {Role.B, Role.HEAD}):
        for model in (adapted, alone):
            model.load([random_client(model, 9)], trained=roles)
        found = []
        for model in (adapted, alone):
            logits = model(inputs)
            wanted = list(model.parameters(roles).values())
            found.append([logits.detach(), *torch.autograd.grad(loss(logits), wanted)])
        check_same(*found)
    assert counts == TOGETHER["bert"] * 2


def test_training_gives_the_same_adapters(counts):
    found = []
    for model in (adapted_model("llama"), apart(adapted_model("llama"))):
        optimizer = torch.optim.SGD(trained(model).values(), lr=0.01)
        for _ in range(4):
            optimizer.zero_grad()
            loss(model(inputs_of("llama"))).backward()
            optimizer.step()
        found.append(list(trained(model).values()))
    check_same(*found)
    assert len(counts) == 4 * len(TOGETHER["llama"])


def test_half_precision_by_autocast(counts):
    inputs = inputs_of("llama")
    alone, adapted = apart(adapted_model("llama")), adapted_model("llama")
    alone.half_precision = adapted.half_precision = True
    torch.testing.assert_close(adapted(inputs), alone(inputs), atol=0.1, rtol=0.05)
    assert counts == TOGETHER["llama"]


# --- alone where it has to be ----------------------------------------------------------------


def test_adapters_that_drop_inputs_are_alone(counts):
    inputs, keys = inputs_of("bert"), row_keys(torch.tensor([5]), 6).flatten()
    adapted = adapted_model("bert", dropout=0.3)
    expected = step(apart(adapted_model("bert", dropout=0.3)), inputs, keys)
    check_same(step(adapted, inputs, keys), expected)
    assert counts == []
    adapted(inputs)
    assert counts == TOGETHER["bert"], "nothing is dropped without keys"


def test_layers_are_alone_while_private_training_watches_them(counts):
    inputs = inputs_of("bert")
    alone, adapted = apart(adapted_model("bert")), adapted_model("bert")
    for model in (alone, adapted):
        with watched(model.model):
            loss(model(inputs)).backward()
            model.samples = [p.grad_sample for p in trained(model).values()]
    for ours, theirs in zip(adapted.samples, alone.samples, strict=True):
        assert torch.equal(ours, theirs)
    assert counts == []
    step(adapted, inputs)
    assert counts == TOGETHER["bert"], "and together again afterwards"


@pytest.mark.parametrize(
    "register",
    [
        lambda layer: layer.register_forward_pre_hook(lambda _, xs: (xs[0] * 2,)),
        lambda layer: layer.register_forward_hook(lambda _, xs, y: y * 2),
        lambda layer: layer.register_full_backward_hook(lambda _, dx, dy: (dx[0] * 2,)),
        lambda layer: layer.register_full_backward_pre_hook(lambda _, dy: (dy[0] * 2,)),
        lambda layer: layer.base.register_forward_hook(lambda _, xs, y: y * 2),
    ],
    ids=["input", "output", "gradient of input", "gradient of output", "base"],
)
@pytest.mark.parametrize("which", ["q_proj", "k_proj"])
def test_hooks_act_on_a_layer_as_if_it_were_alone(which, register, counts):
    found, inputs = [], inputs_of("llama")
    for model in (adapted_model("llama"), apart(adapted_model("llama"))):
        step(model, inputs)
        register(model.model.model.layers[1].self_attn.get_submodule(which))
        counts.clear()
        found.append(step(model, inputs))
    check_same(*found)


@pytest.mark.usefixtures("_without_type_checks")
def test_compiled_model_is_one_graph_with_every_layer_alone(counts):
    inputs, adapted = inputs_of("llama"), adapted_model("llama")
    expected = step(adapted, inputs)
    counts.clear()
    adapted.compile(fullgraph=True, backend="aot_eager")
    check_same(step(adapted, inputs), expected)
    assert counts == []


def test_under_inference_mode_layers_are_alone(counts):
    """Its tensors do not count their changes."""
    adapted, inputs = adapted_model("bert"), inputs_of("bert")
    with torch.inference_mode():
        found = adapted(inputs)
    assert counts == []
    torch.testing.assert_close(found, adapted(inputs))


# --- nothing stale ---------------------------------------------------------------------------


class Parent(nn.Module):
    """Three layers of one width in double precision, called as a test says."""

    def __init__(self) -> None:
        super().__init__()
        settings, self.context = AdapterSettings(rank=2), BatchContext()
        for name in ("first", "second", "third"):
            layer = LoRALinear(nn.Linear(5, 4).double(), settings, name, self.context)
            nn.init.normal_(layer.A)
            nn.init.normal_(layer.B)
            self.add_module(name, layer)
        self.calls: Callable[[Tensor], object] = self.one_x

    def one_x(self, x: Tensor) -> list[Tensor]:
        return [self.first(x), self.second(x), self.third(x)]

    def forward(self, x: Tensor) -> object:
        return self.calls(x)

    def alone(self, name: str, x: Tensor) -> Tensor:
        layer = self.get_submodule(name)
        return functional.linear(x, layer.base.weight, layer.base.bias) + layer.scaling * (
            x @ layer.A[0].T @ layer.B[0].T
        )


@pytest.fixture
def parent(counts: list[int]) -> Parent:
    """All three layers took the same x while it was watched."""
    made = Parent()
    with Siblings(made, [made.first, made.second, made.third]).watched():
        made(torch.randn(2, 5, dtype=torch.float64))
    assert counts == []
    return made


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 5, dtype=torch.float64)


def check_alone(parent: Parent, found: object, expected: dict[str, Tensor]) -> None:
    assert isinstance(found, list)
    for y, (name, x) in zip(found, expected.items(), strict=True):
        torch.testing.assert_close(y, parent.alone(name, x))


def test_all_three_are_computed_at_once(parent, x, counts):
    check_alone(parent, parent(x), dict.fromkeys(("first", "second", "third"), x))
    assert counts == [3]


def test_another_tensor_is_another_x(parent, x):
    parent.calls = lambda x: [parent.first(x), parent.second(x + 1), parent.third(x)]
    check_alone(parent, parent(x), {"first": x, "second": x + 1, "third": x})


def test_x_that_was_changed_in_place_is_another_x(parent, x):
    def change(x: Tensor) -> list[Tensor]:
        first = parent.first(x)
        x.add_(1)
        return [first, parent.second(x), parent.third(x)]

    parent.calls, before = change, x.clone()
    found = parent(x)
    check_alone(parent, found, {"first": before, "second": before + 1, "third": before + 1})


@pytest.mark.parametrize("where", ["A", "B", "base.weight", "base.bias"])
@pytest.mark.parametrize("replaced", [False, True], ids=["in-place", "replaced"])
def test_layer_that_was_changed_meanwhile_is_computed_anew(parent, x, where, replaced):
    def change(x: Tensor) -> list[Tensor]:
        first = parent.first(x)
        owner = parent.second if "." not in where else parent.second.base
        attribute = where.split(".")[-1]
        values = getattr(owner, attribute)
        if replaced:
            setattr(owner, attribute, nn.Parameter(values.detach() + 1))
        else:
            with torch.no_grad():
                values.add_(1)
        return [first, parent.second(x), parent.third(x)]

    parent.calls = change
    found = parent(x)
    check_alone(parent, found, dict.fromkeys(("first", "second", "third"), x))


def test_scaling_that_was_changed_is_used(parent, x):
    parent.second.scaling = 3.0  # after it was watched
    check_alone(parent, parent(x), dict.fromkeys(("first", "second", "third"), x))


def test_hook_that_was_put_on_a_base_meanwhile_acts(parent, x):
    def change(x: Tensor) -> list[Tensor]:
        first = parent.first(x)
        parent.second.base.register_forward_hook(lambda module, x, y: y + 1.0)
        return [first, parent.second(x) - 1.0, parent.third(x)]

    parent.calls = change
    check_alone(parent, parent(x), dict.fromkeys(("first", "second", "third"), x))


def test_factor_that_was_frozen_meanwhile_gets_no_gradient(parent, x):
    def change(x: Tensor) -> list[Tensor]:
        first = parent.first(x)
        parent.second.B.requires_grad_(False)
        return [first, parent.second(x), parent.third(x)]

    parent.calls = change
    sum(y.sum() for y in parent(x)).backward()
    assert parent.second.B.grad is None
    assert parent.second.A.grad is not None


def test_nothing_outlives_a_call_of_the_module(parent, x, counts):
    """Nor does an output wait for the next call with the very same x."""
    parent.calls = lambda x: [parent.first(x)]
    parent(x)
    with torch.no_grad():
        parent.second.B.data.add_(1)  # a change that torch does not count
    torch.testing.assert_close(parent.second(x), parent.alone("second", x))
    parent.calls = lambda x: [parent.second(x)]
    check_alone(parent, parent(x), {"second": x})
    assert counts == [3]


def test_layers_called_from_outside_are_alone(parent, x, counts):
    check_alone(parent, parent.one_x(x), dict.fromkeys(("first", "second", "third"), x))
    assert counts == []


def test_exception_half_way_leaves_nothing_behind(parent, x, counts):
    def fail(x: Tensor) -> None:
        parent.first(x)
        raise RuntimeError("half way")

    parent.calls = fail
    with pytest.raises(RuntimeError, match="half way"):
        parent(x)
    with torch.no_grad():
        parent.second.B.data.add_(1)
    parent.calls = lambda x: [parent.second(x), parent.third(x)]
    check_alone(parent, parent(x), dict.fromkeys(("second", "third"), x))
    parent.calls = parent.one_x
    check_alone(parent, parent(x), dict.fromkeys(("first", "second", "third"), x))
    assert counts == [3, 3], "an exception says nothing about who shares an x"


def test_layer_called_twice_is_computed_twice(parent, x):
    parent.calls = lambda x: [parent.first(x), parent.second(x), parent.second(x)]
    _, second, again = parent(x)
    torch.testing.assert_close(second, parent.alone("second", x))
    torch.testing.assert_close(again, second)
    assert again is not second


def test_gradient_mode_of_each_call_is_kept(parent, x):
    def freeze_second(x: Tensor) -> list[Tensor]:
        first = parent.first(x)
        with torch.no_grad():
            second = parent.second(x)
        return [first, second]

    parent.calls = freeze_second
    first, second = parent(x)
    assert first.requires_grad
    assert not second.requires_grad


def test_autocast_of_each_call_is_kept(parent, x):
    def halve_second(x: Tensor) -> list[Tensor]:
        first = parent.first(x)
        with torch.autocast("cpu", torch.bfloat16):
            return [first, parent.second(x)]

    parent.calls = halve_second
    assert [y.dtype for y in parent(x.float())] == [torch.float32, torch.bfloat16]
    assert [y.dtype for y in parent(x)] == [torch.float64] * 2  # which autocast leaves alone


@pytest.mark.parametrize("reentrant", [False, True])
def test_calls_that_no_longer_fit_are_run_again_as_they_were_run(parent, x, reentrant):
    """Else gradient checkpointing finds other tensors than it left."""
    parent.calls = lambda x: torch.cat([parent.first(x), parent.second(x.clone()), parent.third(x)])
    x.requires_grad_()
    checkpoint(parent, x, use_reentrant=reentrant).square().sum().backward()
    plain = torch.cat([parent.alone(name, x) for name in ("first", "second", "third")])
    torch.testing.assert_close(x.grad, torch.autograd.grad(plain.square().sum(), x)[0])


def test_layers_that_do_not_share_an_x_in_every_pass_are_alone(x, counts):
    made, others = Parent(), iter([x, x.clone()])
    made.calls = lambda x: [made.first(x), made.second(next(others))]
    siblings = Siblings(made, [made.first, made.second, made.third])
    with siblings.watched():
        made(x)
        made(x)
    made.calls = made.one_x
    check_alone(made, made(x), dict.fromkeys(("first", "second", "third"), x))
    assert counts == []


def test_too_much_rank_for_one_pass_is_divided(counts):
    settings = AdapterSettings(rank=100, target_modules=TARGETS["bert"])
    attach(FAMILIES["bert"].make(), settings, seed=0)(inputs_of("bert"))
    assert counts == [2, 2]


# --- what else is done with models -----------------------------------------------------------


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))],
    ids=["copy", "pickle"],
)
def test_copies_of_a_model_call_their_own_layers(copied, counts):
    inputs, adapted = inputs_of("llama"), adapted_model("llama")
    expected = adapted(inputs)
    model = copied(adapted.model)
    with torch.no_grad():
        for name, parameter in adapted.model.named_parameters():
            if name.endswith((".A", ".B")):
                parameter.zero_()
    torch.testing.assert_close(model(**inputs).logits, expected)
    assert counts == TOGETHER["llama"] * 2


def test_names_of_a_models_tensors_are_what_they_were():
    ours = adapted_model("llama").model
    layers = [name for name, m in ours.named_modules() if isinstance(m, LoRALinear)]
    plain = set(FAMILIES["llama"].make().state_dict())
    moved = {
        f"{path}.base.{rest}" if (path := name.rpartition(".")[0]) in layers else name
        for name in plain
        if (rest := name.rpartition(".")[2])
    }
    own = {f"{path}.{factor}" for path in layers for factor in "AB"}
    assert set(ours.state_dict()) == moved | own


def test_generation_watches_too_and_writes_the_same(counts):
    config = GenerationConfig(max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=1)
    for name in ("llama", "t5"):
        inputs = {k: v for k, v in inputs_of(name).items() if k != "decoder_input_ids"}
        expected = apart(adapted_model(name)).generate(inputs, config)
        assert torch.equal(adapted_model(name).generate(inputs, config), expected)
        assert counts[:2] == TOGETHER[name][:2]
        counts.clear()
