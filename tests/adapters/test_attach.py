"""What `attach` makes of a model, and how clients move in and out of it."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    DistilBertConfig,
    DistilBertForSequenceClassification,
    FNetConfig,
    FNetForSequenceClassification,
)

from fedsa_kernels import row_keys
from fedsa_secure.adapters import AdaptedModel, AdapterSettings, LoRALinear, attach
from fedsa_secure.errors import AdapterError, ConfigError
from fedsa_secure.types import NamedTensors, Role

SETTINGS = AdapterSettings(rank=4, alpha=8.0)
EVERYTHING = AdapterSettings(
    rank=4, alpha=8.0, dropout=0.3, target_modules=("query", "key", "value", "dense")
)


def make_inputs(rows: int = 6, tokens: int = 9, seed: int = 0) -> dict[str, Tensor]:
    """Rows of unequal length."""
    stream = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, tokens + 1, (rows, 1), generator=stream)
    mask = (torch.arange(tokens) < lengths).long()
    ids = torch.randint(4, 200, (rows, tokens), generator=stream)
    return {"input_ids": ids * mask, "attention_mask": mask}


def random_clients(adapted: AdaptedModel, count: int) -> list[NamedTensors]:
    stream = torch.Generator().manual_seed(7)
    return [
        {
            name: start + 0.2 * torch.randn(start.shape, generator=stream)
            for name, start in adapted.initial.items()
        }
        for _ in range(count)
    ]


def segment(inputs: dict[str, Tensor], client: int, clients: int) -> dict[str, Tensor]:
    return {name: values.chunk(clients)[client] for name, values in inputs.items()}


# --- refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [("qeury",), ("value", "qeury")])
def test_unknown_target_is_refused_with_the_nearest_name(tiny_bert, names):
    with pytest.raises(ConfigError, match=r"'qeury'.*did you mean 'query'") as refused:
        attach(tiny_bert(), AdapterSettings(target_modules=names), seed=0)
    assert refused.value.option == "target_modules"


@pytest.mark.parametrize(
    ("name", "kind"), [("word_embeddings", "Embedding"), ("LayerNorm", "LayerNorm")]
)
def test_target_that_is_not_linear_is_refused(tiny_bert, name, kind):
    with pytest.raises(ConfigError, match=f"{name} is a {kind}") as refused:
        attach(tiny_bert(), AdapterSettings(target_modules=("query", name)), seed=0)
    assert refused.value.option == "target_modules"


def test_architecture_unknown_to_peft_has_its_queries_and_values_adapted(tiny_bert):
    model = tiny_bert()
    model.config.model_type = "homemade"
    adapted = attach(model, SETTINGS, seed=0)
    assert {path.split(".")[-1] for path in adapted.layers()} == {"query", "value"}


def test_architecture_without_default_targets_is_refused():
    model = FNetForSequenceClassification(FNetConfig(vocab_size=200, hidden_size=32))
    with pytest.raises(ConfigError, match="no default for models of type 'fnet'"):
        attach(model, SETTINGS, seed=0)


@pytest.mark.parametrize("name", ["qeury", "LayerNorm"])
def test_refused_model_is_left_without_adapters(tiny_bert, name):
    model = tiny_bert()
    with pytest.raises(ConfigError):
        attach(model, AdapterSettings(target_modules=("query", name)), seed=0)
    assert not any(isinstance(module, LoRALinear) for module in model.modules())


# --- the fresh model -------------------------------------------------------------------------


@pytest.mark.parametrize("clients", [1, 3])
def test_fresh_adapters_change_nothing(tiny_roberta, clients):
    base, adapted = tiny_roberta().eval(), attach(tiny_roberta(), SETTINGS, seed=0)
    adapted.load([{}] * clients, trained=set(Role))
    inputs = make_inputs()
    torch.testing.assert_close(adapted(inputs), base(**inputs).logits, atol=1e-6, rtol=1e-6)


def test_start_of_a_depends_on_the_seed_and_the_layer_alone(tiny_bert):
    few, many, other = (
        attach(tiny_bert(), AdapterSettings(rank=4, target_modules=names), seed=seed)
        for names, seed in ((("query",), 0), (("query", "value"), 0), (("query",), 1))
    )
    starts = {name: few.initial[name] for name in few.names([Role.A])}
    assert all(torch.equal(many.initial[name], start) for name, start in starts.items())
    assert not any(torch.equal(other.initial[name], start) for name, start in starts.items())
    first, second, *_ = starts.values()
    assert not torch.equal(first, second)


def test_start_of_a_is_drawn_as_kaiming_uniform_draws_it(tiny_bert):
    """PEFT starts A with `kaiming_uniform_(a=√5)`: uniform within 1/√d_in."""
    adapted = attach(tiny_bert(), AdapterSettings(rank=512, target_modules=("dense",)), seed=0)
    for name in adapted.names([Role.A]):
        start = adapted.initial[name]
        theirs = nn.init.kaiming_uniform_(torch.empty_like(start), a=5**0.5)
        bound = start.shape[1] ** -0.5
        assert 0.999 * bound < start.abs().max() <= bound
        assert abs(start.mean()) < 5 * bound / (3 * start.numel()) ** 0.5
        assert start.std() == pytest.approx(theirs.std().item(), rel=0.02)
    assert all(not adapted.initial[name].any() for name in adapted.names([Role.B]))


def test_own_dropout_of_the_base_is_off(tiny_bert):
    adapted = attach(tiny_bert(), SETTINGS, seed=0)
    inputs = make_inputs()
    assert torch.equal(adapted(inputs), adapted(inputs))


# --- roles and names -------------------------------------------------------------------------


def make_distilbert() -> nn.Module:
    config = DistilBertConfig(vocab_size=200, dim=32, n_layers=2, n_heads=2, hidden_dim=48)
    return DistilBertForSequenceClassification(config)


@pytest.mark.parametrize(
    ("architecture", "layers", "targets"),
    [
        ("bert", ["classifier"], ["query", "value"]),
        ("roberta", ["classifier.dense", "classifier.out_proj"], ["query", "value"]),
        ("distilbert", ["pre_classifier", "classifier"], ["q_lin", "v_lin"]),
    ],
)
def test_head_is_every_linear_layer_outside_the_base(
    architecture, layers, targets, tiny_bert, tiny_roberta
):
    make = {"bert": tiny_bert, "roberta": tiny_roberta, "distilbert": make_distilbert}[architecture]
    settings = AdapterSettings(rank=4, target_modules=tuple(targets))
    adapted = attach(make(), settings, seed=0)
    expected = [f"{layer}.{part}" for layer in layers for part in ("weight", "bias")]
    assert adapted.names([Role.HEAD]) == expected
    assert {name.split(".")[-2] for name in adapted.names([Role.A])} == set(targets)


def test_head_is_never_a_target(tiny_roberta):
    """RoBERTa has layers called dense in its base and in its head."""
    adapted = attach(tiny_roberta(), AdapterSettings(target_modules=("dense",)), seed=0)
    assert all(name.startswith("roberta.") for name in adapted.names([Role.A, Role.B]))
    assert "classifier.dense.weight" in adapted.names([Role.HEAD])


def test_names_are_divided_by_role_and_keep_their_order(tiny_bert):
    adapted = attach(tiny_bert(), SETTINGS, seed=0)
    everything = adapted.names(set(Role))
    by_role = {role: adapted.names([role]) for role in Role}
    assert sorted(name for names in by_role.values() for name in names) == sorted(everything)
    assert [name for name in everything if name in by_role[Role.A]] == by_role[Role.A]
    assert [name.removesuffix(".A") for name in by_role[Role.A]] == [
        name.removesuffix(".B") for name in by_role[Role.B]
    ]
    assert adapted.names([]) == []
    assert adapted.initial.keys() == set(everything)
    assert list(adapted.parameters([Role.A, Role.HEAD])) == adapted.names([Role.A, Role.HEAD])


# --- clients in and out ----------------------------------------------------------------------


def test_stack_of_clients_gives_what_each_gives_alone(tiny_roberta):
    adapted = attach(tiny_roberta(), SETTINGS, seed=0)
    clients, inputs = random_clients(adapted, 3), make_inputs()
    adapted.load(clients, trained=())
    assert adapted.clients == 3
    together = adapted(inputs).chunk(3)
    for c, client in enumerate(clients):
        adapted.load([client], trained=())
        alone = adapted(segment(inputs, c, 3))
        torch.testing.assert_close(together[c], alone, atol=1e-5, rtol=1e-5)
    assert (together[0] - together[1]).abs().max() > 1e-2


@pytest.mark.parametrize("architecture", ["bert", "roberta"])
def test_stack_of_clients_drops_what_each_drops_alone(architecture, tiny_bert, tiny_roberta):
    """On every linear layer, the pooler too, which sees one vector per row."""
    make = {"bert": tiny_bert, "roberta": tiny_roberta}[architecture]
    adapted = attach(make(), EVERYTHING, seed=0)
    clients, inputs = random_clients(adapted, 3), make_inputs()
    words = torch.tensor([11, 12, 13])
    adapted.load(clients, trained=())
    together = adapted(inputs, row_keys(words, 2).flatten()).chunk(3)
    for c, client in enumerate(clients):
        adapted.load([client], trained=())
        keys = row_keys(words[c : c + 1], 2).flatten()
        alone = adapted(segment(inputs, c, 3), keys)
        torch.testing.assert_close(together[c], alone, atol=1e-5, rtol=1e-5)
        assert (adapted(segment(inputs, c, 3)) - alone).abs().max() > 1e-3, "nothing was dropped"


def test_what_was_loaded_is_unloaded(tiny_bert):
    adapted = attach(tiny_bert(), SETTINGS, seed=0)
    clients = random_clients(adapted, 3)
    adapted.load(clients, trained=set(Role))
    adapted(make_inputs())
    for role in Role:
        for client, unloaded in zip(clients, adapted.unload([role]), strict=True):
            assert list(unloaded) == adapted.names([role])
            for name, values in unloaded.items():
                assert torch.equal(values, client[name])
                assert not values.requires_grad


def test_tensors_that_a_client_lacks_are_at_their_public_start(tiny_bert):
    adapted = attach(tiny_bert(), SETTINGS, seed=0)
    (client,) = random_clients(adapted, 1)
    heads = {name: client[name] for name in adapted.names([Role.HEAD])}
    adapted.load([heads, {}], trained=())
    first, second = adapted.unload(set(Role))
    for name, start in adapted.initial.items():
        assert torch.equal(first[name], heads.get(name, start))
        assert torch.equal(second[name], start)


def test_neither_unloaded_nor_loaded_tensors_share_memory_with_the_model(tiny_bert):
    adapted = attach(tiny_bert(), SETTINGS, seed=0)
    clients = random_clients(adapted, 1)
    adapted.load(clients, trained=set(Role))
    before = adapted.unload(set(Role))[0]
    for tensors in (clients[0], adapted.unload(set(Role))[0], adapted.initial):
        for values in tensors.values():
            values.fill_(float("nan"))
    after = adapted.unload(set(Role))[0]
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("trained", [{Role.A}, {Role.B, Role.HEAD}, set(), set(Role)])
def test_only_trained_roles_want_gradients(tiny_bert, trained):
    adapted = attach(tiny_bert(), SETTINGS, seed=0)
    adapted.load([{}, {}], trained=trained)
    wanting = [name for name, p in adapted.model.named_parameters() if p.requires_grad]
    assert sorted(wanting) == sorted(adapted.names(trained))


def test_base_never_changes_and_gets_no_gradient(tiny_roberta):
    fresh = tiny_roberta().state_dict()
    adapted = attach(tiny_roberta(), EVERYTHING, seed=0)
    adapted.load(random_clients(adapted, 2), trained=set(Role))
    trained = adapted.parameters(set(Role))
    optimizer = torch.optim.SGD(adapted.model.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        functional.cross_entropy(adapted(make_inputs()), torch.tensor([0, 1, 2] * 2)).backward()
        optimizer.step()
    ours = {id(parameter) for parameter in trained.values()}
    frozen = [p for p in adapted.model.parameters() if id(p) not in ours]
    assert all(parameter.grad is None for parameter in frozen)
    assert all(parameter.grad.any() for parameter in trained.values())
    head = set(adapted.names([Role.HEAD]))
    after = {
        name.replace(".base.", "."): values for name, values in adapted.model.state_dict().items()
    }
    checked = [name for name in fresh if name not in head]
    assert all(torch.equal(after[name], fresh[name]) for name in checked)
    assert len(checked) == len(frozen)


# --- layers that mix clients -----------------------------------------------------------------


@pytest.fixture
def deberta(tiny_deberta) -> AdaptedModel:
    """Its query and key layers also see the relative embeddings, which are rows of no client."""
    settings = AdapterSettings(rank=4, dropout=0.1, target_modules=("query_proj", "key_proj"))
    return attach(tiny_deberta(layers=1), settings, seed=0)


@pytest.mark.parametrize("rows", [2, 6])
def test_layer_called_with_rows_of_no_client_is_refused_by_name(deberta, rows):
    deberta.load([{}, {}], trained=())
    with pytest.raises(
        AdapterError, match=r"deberta\.encoder.*(query|key)_proj .*clients_per_pass"
    ):
        deberta(make_inputs(rows=rows))


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("dropout", [False, True], ids=["plain", "dropout"])
def test_such_a_layer_works_with_one_client(deberta, rows, dropout):
    inputs = make_inputs(rows=rows)
    keys = row_keys(torch.tensor([3]), rows).flatten() if dropout else None
    deberta.load(random_clients(deberta, 1), trained={Role.A, Role.B})
    logits = deberta(inputs, keys)
    assert logits.shape == (rows, 3)
    logits.square().sum().backward()
    assert all(p.grad.any() for p in deberta.parameters({Role.A, Role.B}).values())


# --- with the rest of torch ------------------------------------------------------------------


def test_autocast_gives_logits_near_those_of_full_precision(tiny_bert):
    adapted = attach(tiny_bert(), SETTINGS, seed=0)
    adapted.load(random_clients(adapted, 2), trained=set(Role))
    inputs = make_inputs()
    expected = adapted(inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = adapted(inputs)
    torch.testing.assert_close(actual.float(), expected, atol=0.1, rtol=0.05)


def test_gradient_checkpointing_gives_the_same_gradients(tiny_bert):
    adapted = attach(tiny_bert(), EVERYTHING, seed=0)
    adapted.load(random_clients(adapted, 2), trained=set(Role))
    inputs = make_inputs()
    keys = row_keys(torch.tensor([1, 2]), 3).flatten()

    def gradients() -> list[Tensor]:
        loss = adapted(inputs, keys).square().sum()
        return list(torch.autograd.grad(loss, list(adapted.parameters(set(Role)).values())))

    plain = gradients()
    calls = []
    layer = adapted.model.bert.encoder.layer[0].attention.self.query
    layer.register_forward_hook(lambda *_: calls.append(1))
    adapted.checkpoint_gradients()
    again = gradients()
    assert len(calls) == 2, "the layer was not run again"
    for ours, theirs in zip(again, plain, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("between", ["training", "evaluation"])
def test_batches_between_forward_and_backward_change_no_gradient(tiny_bert, between):
    """The backward pass runs checkpointed layers again, with the dropout of their own batch."""
    found = []
    for checkpointed in (False, True):
        adapted = attach(tiny_bert(), EVERYTHING, seed=0)
        adapted.load(random_clients(adapted, 2), trained=set(Role))
        if checkpointed:
            adapted.checkpoint_gradients()
        first, second = (row_keys(torch.tensor(each), 3).flatten() for each in ([1, 2], [3, 4]))
        loss = adapted(make_inputs(), first).square().sum()
        if between == "training":
            loss = loss + adapted(make_inputs(seed=1), second).square().sum()
        else:
            with torch.no_grad():
                adapted(make_inputs(rows=4, seed=1))
        found.append(torch.autograd.grad(loss, list(adapted.parameters(set(Role)).values())))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


def test_clients_loaded_before_the_backward_pass_of_checkpointed_layers_are_refused(tiny_bert):
    adapted = attach(tiny_bert(), EVERYTHING, seed=0)
    adapted.load(random_clients(adapted, 2), trained=set(Role))
    adapted.checkpoint_gradients()
    loss = adapted(make_inputs()).sum()
    adapted.load(random_clients(adapted, 2), trained=set(Role))
    with pytest.raises(AdapterError, match="loaded between a forward pass and its backward pass"):
        loss.backward()


def test_rows_that_do_not_split_over_clients_are_refused(tiny_bert):
    adapted = attach(tiny_bert(), SETTINGS, seed=0)
    adapted.load(random_clients(adapted, 2), trained=())
    with pytest.raises(AdapterError, match="3 rows do not split into segments of 2 clients"):
        adapted(make_inputs(rows=3))


def test_layer_in_two_places_is_refused_by_both_names(tiny_bert):
    model = tiny_bert()
    first, second = (layer.attention.self for layer in model.bert.encoder.layer)
    second.query = first.query
    with pytest.raises(ConfigError, match=r"layer\.0.*query and .*layer\.1.*query are one layer"):
        attach(model, SETTINGS, seed=0)
