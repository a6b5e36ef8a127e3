"""Frozen layers that are not plain: quantised ones, and others with a forward of their own."""

from collections.abc import Callable, Iterator

import pytest
import torch
from families import FAMILIES, Family, loss, peft_gradients, random_client, with_peft
from torch import Tensor, nn

from fedsa_secure.adapters import AdaptedModel, AdapterSettings, attach, merged_weights
from fedsa_secure.errors import AdapterError
from fedsa_secure.types import Role

KINDS = ("lora", "rslora", "vera")
BERT = FAMILIES["bert"]
# Adapted and not adapted layers, so that gradients have to pass both; Llama's have no bias.
PACKED = {
    "bert": ("query", "value", "intermediate.dense", "attention.output.dense"),
    "llama-classes": ("q_proj", "v_proj", "down_proj"),
}


class Int8Linear(nn.Module):
    """Not an nn.Linear: an int8 weight, unpacked in its own forward."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = base.in_features, base.out_features
        step = base.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("step", step)
        self.register_buffer("packed", (base.weight.detach() / step).round().to(torch.int8))
        self.bias = base.bias

    def unpacked(self) -> nn.Linear:
        plain = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None)
        values = {"weight": self.packed * self.step}
        plain.load_state_dict(values if self.bias is None else values | {"bias": self.bias})
        return plain

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.packed * self.step, self.bias)


class ForwardOnly(Int8Linear):
    """As a kernel without a backward pass."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).detach()


def replace(model: nn.Module, names: tuple[str, ...], make: Callable) -> nn.Module:
    """A model whose layers with these names went through ``make``."""
    for path, module in list(model.named_modules()):
        if path.endswith(names):
            model.set_submodule(path, make(module))
    return model


def settings_of(family: Family, kind: str) -> AdapterSettings:
    return AdapterSettings(kind=kind, rank=5, alpha=12.0, target_modules=family.targets)


def repeated(inputs: dict[str, Tensor], count: int) -> dict[str, Tensor]:
    return {name: values.repeat(count, 1) for name, values in inputs.items()}


def step(adapted: AdaptedModel, count: int, inputs: dict[str, Tensor]) -> tuple[Tensor, dict]:
    """Logits and every gradient of some clients."""
    adapted.load([random_client(adapted, seed) for seed in range(count)], trained=set(Role))
    logits = adapted(repeated(inputs, count))
    loss(logits).backward()
    return logits, {name: p.grad for name, p in adapted.parameters(set(Role)).items()}


def assert_same(actual: tuple[Tensor, dict], expected: tuple[Tensor, dict]) -> None:
    torch.testing.assert_close(actual[0], expected[0], atol=1e-5, rtol=1e-5)
    assert actual[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert gradient.abs().max() > 1e-3, f"{name}: nothing to compare"
        torch.testing.assert_close(actual[1][name], gradient, atol=1e-5, rtol=1e-5, msg=name)


# --- a stand-in ------------------------------------------------------------------------------


@pytest.mark.parametrize("clients", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", PACKED)
def test_adapters_on_packed_layers_train_as_on_plain_layers_of_the_same_weight(name, kind, clients):
    family = FAMILIES[name]
    packed = replace(family.make(), PACKED[name], Int8Linear)
    plain = replace(family.make(), PACKED[name], lambda m: Int8Linear(m).unpacked())
    ours = attach(packed, settings_of(family, kind), seed=0)
    assert {type(layer.base) for layer in ours.layers().values()} == {Int8Linear}
    assert {name.rpartition(".")[0] for name in ours.names([Role.A])} == set(ours.layers())
    expected = step(attach(plain, settings_of(family, kind), seed=0), clients, family.inputs())
    assert_same(step(ours, clients, family.inputs()), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", PACKED)
def test_packed_layer_gives_its_own_output_and_the_adapter_on_top(name, kind):
    """W·x by the packed layer itself, ΔW·x by the weights that would be merged."""
    family = FAMILIES[name]
    adapted = attach(
        replace(family.make(), PACKED[name], Int8Linear), settings_of(family, kind), seed=0
    )
    clients = [random_client(adapted, seed) for seed in range(3)]
    adapted.load(clients, trained=())
    seen = {}
    for path, layer in adapted.layers().items():
        layer.register_forward_hook(lambda _, x, y, path=path: seen.update({path: (x[0], y)}))
    adapted(repeated(family.inputs(), 3))
    assert {layer.d_in == layer.d_out for layer in adapted.layers().values()} == {True, False}
    for path, layer in adapted.layers().items():
        x, y = seen[path]
        for client, rows, actual in zip(clients, x.chunk(3), y.chunk(3), strict=True):
            own = {
                name.removeprefix(f"{path}."): values
                for name, values in client.items()
                if name.startswith(f"{path}.")
            }
            expected = layer.base(rows) + rows @ layer.delta(own).t()
            torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5, msg=path)


def add_one_by_a_hook(layer: nn.Linear) -> None:
    layer.register_forward_hook(lambda module, x, y: y + 1.0)


def add_one_by_a_forward_of_its_own(layer: nn.Linear) -> None:
    forward = layer.forward
    layer.forward = lambda x: forward(x) + 1.0


@pytest.mark.parametrize("add_one", [add_one_by_a_hook, add_one_by_a_forward_of_its_own])
def test_plain_layer_that_others_changed_is_called(add_one):
    """Some libraries work by hooks on a plain layer, or replace its forward pass."""
    model = BERT.make()
    add_one(model.bert.encoder.layer[1].intermediate.dense)
    adapted = attach(model, settings_of(BERT, "lora"), seed=0)
    expected = BERT.make()
    with torch.no_grad():
        expected.bert.encoder.layer[1].intermediate.dense.bias += 1.0
    inputs = BERT.inputs()
    torch.testing.assert_close(adapted(inputs), expected(**inputs).logits, atol=1e-5, rtol=1e-5)


def test_backward_hooks_of_a_layer_run():
    adapted, calls = attach(BERT.make(), settings_of(BERT, "lora"), seed=0), []
    adapted.load([{}], trained={Role.A, Role.B})
    layer = adapted.model.bert.encoder.layer[1].intermediate.dense
    layer.base.register_full_backward_hook(lambda *_: calls.append(1))
    adapted(BERT.inputs()).sum().backward()
    assert calls == [1]


@pytest.mark.parametrize("kind", KINDS)
def test_layer_that_passes_no_gradient_is_refused_by_name(kind):
    path = "bert.encoder.layer.1.intermediate.dense"
    adapted = attach(replace(BERT.make(), (path,), ForwardOnly), settings_of(BERT, kind), seed=0)
    adapted.load([{}], trained=set(Role))
    with pytest.raises(AdapterError, match=rf"^{path} is a ForwardOnly, .*no gradient"):
        adapted(BERT.inputs())


def test_layer_that_passes_no_gradient_works_where_none_is_needed():
    """In evaluation, and where nothing is trained below it."""
    path = "bert.encoder.layer.0.intermediate.dense"
    settings = AdapterSettings(rank=5, alpha=12.0, target_modules=(path,))
    expected = attach(
        replace(BERT.make(), (path,), lambda m: Int8Linear(m).unpacked()), settings, seed=0
    )
    lowest = attach(replace(BERT.make(), (path,), ForwardOnly), settings, seed=0)
    assert_same(step(lowest, 2, BERT.inputs()), step(expected, 2, BERT.inputs()))

    everywhere = attach(
        replace(BERT.make(), PACKED["bert"], ForwardOnly), settings_of(BERT, "lora"), 0
    )
    everywhere.load([{}], trained=set(Role))
    with torch.no_grad():
        assert everywhere(BERT.inputs()).isfinite().all()


def test_packed_weights_are_not_merged():
    packed = attach(replace(BERT.make(), ("value",), Int8Linear), settings_of(BERT, "lora"), seed=0)
    with pytest.raises(AdapterError, match=r"layer\.0\.attention\.self\.value is a Int8Linear"):
        merged_weights(packed, {})


def test_packed_head_is_refused_by_name():
    """Every client gets a copy of the head and trains it."""
    model = replace(BERT.make(), ("classifier",), Int8Linear)
    with pytest.raises(AdapterError, match="classifier .*quantised"):
        attach(model, settings_of(BERT, "lora"), seed=0)


# --- libraries -------------------------------------------------------------------------------


def torchao_model(family: Family) -> nn.Module:
    quantization = pytest.importorskip("torchao.quantization")

    def chosen(module: nn.Module, path: str) -> bool:
        return isinstance(module, nn.Linear) and path not in (*(family.head or ()), "lm_head")

    model = family.make()
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig(), filter_fn=chosen)
    return model


@pytest.mark.filterwarnings("ignore:TorchaoLoraLinear was instantiated")  # PEFT cannot merge it
@pytest.mark.parametrize("name", ["bert", "llama", "llama-classes"])
def test_lora_on_torchao_trains_as_in_peft(name):
    family = FAMILIES[name]
    adapted = attach(torchao_model(family), settings_of(family, "lora"), seed=0)
    client = random_client(adapted, 0)
    theirs = with_peft(torchao_model(family), adapted, client)
    logits = theirs(**family.inputs()).logits
    loss(logits).backward()
    expected = {name: gradient[None] for name, gradient in peft_gradients(theirs).items()}
    assert_same(step(adapted, 1, family.inputs()), (logits, expected))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("clients", [1, 3])
def test_adapters_on_torchao_train_as_on_its_unpacked_weights(kind, clients):
    family = FAMILIES["bert"]
    packed, plain = torchao_model(family), family.make()
    for path, module in plain.named_modules():
        if isinstance(module, nn.Linear) and path != "classifier":
            module.weight.data = packed.get_submodule(path).weight.dequantize()
    expected = step(attach(plain, settings_of(family, kind), seed=0), clients, family.inputs())
    ours = attach(packed, settings_of(family, kind), seed=0)
    assert_same(step(ours, clients, family.inputs()), expected)
    with pytest.raises(AdapterError, match=r"^bert\..* is a Linear whose weight is a packed Int8"):
        merged_weights(ours, {})


def test_head_quantised_by_torchao_is_refused_by_name():
    quantization = pytest.importorskip("torchao.quantization")
    model = BERT.make()
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    with pytest.raises(AdapterError, match="^classifier .*quantised"):
        attach(model, settings_of(BERT, "lora"), seed=0)


@pytest.fixture(params=["nf4", "int8"])
def bitsandbytes_model(request) -> Iterator[Callable[[Family], nn.Module]]:
    bnb = pytest.importorskip("bitsandbytes")

    def packed(base: nn.Linear) -> nn.Module:
        sizes, bias = (base.in_features, base.out_features), base.bias is not None
        if request.param == "nf4":
            layer = bnb.nn.Linear4bit(
                *sizes, bias=bias, compute_dtype=torch.float32, quant_type="nf4"
            )
        else:
            layer = bnb.nn.Linear8bitLt(*sizes, bias=bias, has_fp16_weights=False)
        layer.load_state_dict(base.state_dict())
        return layer.to("cpu")  # which packs it

    return lambda family: replace(family.make(), PACKED["bert"], packed)


@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
def test_lora_on_bitsandbytes_trains_as_in_peft_and_stays_exact_after_evaluation(
    bitsandbytes_model,
):
    inputs = BERT.inputs()
    adapted = attach(bitsandbytes_model(BERT), settings_of(BERT, "lora"), seed=0)
    client = random_client(adapted, 0)
    theirs = with_peft(bitsandbytes_model(BERT), adapted, client)
    for module in theirs.modules():  # as attach() does, else evaluation repacks the weights
        module.support_avx512bf16_for_cpu = False
    logits = theirs(**inputs).logits
    loss(logits).backward()
    expected = {name: gradient[None] for name, gradient in peft_gradients(theirs).items()}

    before = step(adapted, 1, inputs)
    assert_same(before, (logits, expected))
    with torch.no_grad():
        torch.testing.assert_close(adapted(inputs), before[0], atol=1e-5, rtol=1e-5)
    after = step(adapted, 1, inputs)
    assert torch.equal(after[0], before[0])
    assert all(torch.equal(after[1][name], gradient) for name, gradient in before[1].items())
    with pytest.raises(AdapterError, match=r"^bert\..* is a Linear\w+ whose weight is a packed"):
        merged_weights(adapted, {})
