"""Options, models and methods with differential privacy: sound, or refused by name."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertForSequenceClassification

import fedsa_secure
from fedsa_secure import ConfigError
from fedsa_secure.config import TrainConfig
from fedsa_secure.errors import FedSAError, PrivacyError
from fedsa_secure.federation.mechanism import Mechanism, calibrated
from fedsa_secure.federation.private_options import check_private_options
from fedsa_secure.federation.private_training import clip_groups, released_method
from fedsa_secure.methods import METHODS, find_method
from fedsa_secure.privacy import ClipGroup, PrivateStep, TurnSecret, refuse_mixing
from fedsa_secure.types import Role

MakeFederation = Callable[..., Any]
SHARING = [name for name, method in METHODS.items() if method.shared]
PRIVATE = {
    "dp_epsilon": 8.0,
    "dp_noise_multiplier": 1.0,
    "dp_test_seed": 11,
    "rounds": 1,
    "local_steps": 2,
    "personal_steps": 1,
    "cross_rows": 0,
}


def check_refused(
    option: str, problem: str, records: tuple[int, ...] = (50, 60), **options: Any
) -> None:
    """These options are refused, and the error names this one."""
    config = TrainConfig.build(dp_epsilon=3.0, clients=len(records), **options)
    with pytest.raises(FedSAError, match=problem) as caught:
        check_private_options(config, find_method(config.method, config.head), list(records))
    assert str(caught.value).startswith(option)


@pytest.mark.parametrize("method", [name for name in METHODS if name not in SHARING])
def test_methods_that_send_nothing_have_nothing_to_protect(method: str) -> None:
    check_refused("dp_epsilon", "nothing leaves a client", method=method)
    check_refused("dp_epsilon", "nothing leaves a client", method=method, dp_unit="client")


@pytest.mark.parametrize("unit", ["record", "client"])
def test_weights_by_rows_are_refused(unit: str) -> None:
    check_refused("weighting", "has no noise", weighting="samples", weight_cap=9, dp_unit=unit)


def test_delta_has_to_be_below_one_over_those_it_protects() -> None:
    check_refused("dp_delta", "one over 60 records", dp_delta=1 / 60)
    check_refused("dp_delta", "one over 3 clients", (5, 5, 5), dp_delta=0.4, dp_unit="client")
    config = TrainConfig.build(dp_epsilon=3.0, dp_delta=1 / 61)
    check_private_options(config, find_method("fedsa"), [50, 60])


@pytest.mark.parametrize("most", [6, 7, 60, 1500])
def test_the_delta_that_is_proposed_would_be_accepted(most: int) -> None:
    config = TrainConfig.build(dp_epsilon=3.0, dp_delta=0.5)
    with pytest.raises(PrivacyError) as caught:
        check_private_options(config, find_method("fedsa"), [2, most])
    proposed = float(str(caught.value).rsplit(" ", 1)[1].rstrip("."))
    config = config.replace(dp_delta=0.999 * proposed)
    check_private_options(config, find_method("fedsa"), [2, most])


def test_noise_that_is_spread_over_clients_does_not_protect_records() -> None:
    check_refused("dp_noise", "feed the next ones", dp_noise="distributed")


@pytest.mark.parametrize("method", [name for name in SHARING if name != "fedsa"])
def test_frozen_b_needs_a_method_that_shares_a_alone(method: str) -> None:
    check_refused("dp_release", "shares A and keeps B", dp_release="frozen-b", method=method)


@pytest.mark.parametrize("option", ["compile", "gradient_checkpointing"])
def test_passes_that_hide_gradients_of_records_are_refused(option: str) -> None:
    check_refused(option, "one plain forward", **{option: True})


@pytest.mark.parametrize(
    "options",
    [
        {"dp_release": "frozen-b"},
        {"dp_sampling_rate": 0.5},
        {"dp_clip_weights": "joint"},
        {"dp_control": "noise"},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_for_records_are_of_no_use_for_clients(options: dict[str, Any]) -> None:
    check_refused(next(iter(options)), "of no use", dp_unit="client", **options)


@pytest.mark.parametrize(
    "options", [{"secure_aggregation": False}, {"threat": "honest-but-curious"}], ids=str
)
def test_shares_of_noise_need_the_whole_protocol(options: dict[str, Any]) -> None:
    check_refused(
        "dp_noise", "only inside a sum", dp_unit="client", dp_noise="distributed", **options
    )


def test_the_grid_of_distributed_noise_is_not_for_the_user() -> None:
    check_refused(
        "update_range", "grid", dp_unit="client", dp_noise="distributed", update_range=1.0
    )


class Linear8bitLt(nn.Linear):
    """Named as that of bitsandbytes, which looks for outliers over the whole batch."""


@pytest.mark.parametrize("part", [nn.BatchNorm1d(4), nn.SyncBatchNorm(4), Linear8bitLt(4, 4)])
def test_operators_that_mix_rows_are_refused_by_name(part: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(part))
    with pytest.raises(PrivacyError, match=rf"1\.0 \({type(part).__name__}\)"):
        refuse_mixing(model)


class MixingBert(BertForSequenceClassification):
    """Its logits are relative to the largest one in the batch."""

    def forward(self, *arguments: Any, **options: Any) -> Any:
        output = super().forward(*arguments, **options)
        output.logits = output.logits / output.logits.abs().max()
        return output


class NormedBert(BertForSequenceClassification):
    """It has a batch norm on its pooled output."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.dropout = nn.BatchNorm1d(config.hidden_size)


@pytest.mark.parametrize(
    ("kind", "seed", "named"),
    [
        *((MixingBert, seed, "the model: ") for seed in range(5)),
        (NormedBert, 0, r"dropout \(BatchNorm1d\)"),
    ],
)
def test_models_that_mix_rows_are_refused_before_anything_is_written(
    tiny_bert: Any,
    tiny_tokenizer: Any,
    small_dataset: Any,
    tmp_path: Any,
    kind: type,
    seed: int,
    named: str,
) -> None:
    model = kind(tiny_bert().config).eval()
    model.load_state_dict(tiny_bert(seed=seed).state_dict(), strict=False)
    with pytest.raises(PrivacyError, match=named):
        fedsa_secure.train(
            model,
            small_dataset(90),
            tokenizer=tiny_tokenizer,
            clients=3,
            partition="iid",
            clients_per_pass=1,
            target_modules="query",
            max_length=16,
            dp_epsilon=8.0,
            dp_noise_multiplier=2.0,
            common_rows=0,
            output_dir=str(tmp_path / "run"),
        )
    assert not (tmp_path / "run").exists()


def private_step(model: Any, groups: list[ClipGroup]) -> PrivateStep:
    """The step that the release path takes, over these groups."""
    parameters = [parameter for group in groups for parameter in group.parameters]
    return PrivateStep(
        model,
        groups,
        torch.optim.SGD(parameters, lr=0.1),
        noise_multiplier=1.0,
        expected_batches=torch.ones(2),
        secrets=[TurnSecret.fresh() for _ in range(2)],
    )


@pytest.mark.parametrize("adapter", ["lora", "vera"])
@pytest.mark.parametrize("head", ["local", "frozen", "shared"])
@pytest.mark.parametrize("method", SHARING)
def test_no_option_trains_something_in_the_release_path_without_noise(
    federation: MakeFederation, method: str, head: str, adapter: str
) -> None:
    """The construction that is not private: A with noise, and B or the head without."""
    made = federation(**PRIVATE, method=method, adapter=adapter)
    for release in ("twin", "frozen-b"):
        for weights in ("joint", (1.0, 2.0, 0.5)):
            config = made.config.replace(head=head, dp_release=release, dp_clip_weights=weights)
            row = find_method(method, head)
            try:
                check_private_options(config, row, [50, 60])
            except PrivacyError:
                assert (release, method == "fedsa") == ("frozen-b", False)
                continue
            check_all_noised(made.model, config, row)


def check_all_noised(model: Any, config: TrainConfig, row: Any) -> None:
    released = released_method(row, config)
    assert released.shared == row.shared
    model.load([{}, {}], released.trained)
    mechanism = Mechanism.of(config, 10)
    groups = clip_groups(model, released, mechanism)
    noised = [parameter for group in groups for parameter in group.parameters]
    trained = [parameter for parameter in model.model.parameters() if parameter.requires_grad]
    assert {id(each) for each in noised} == {id(each) for each in trained}
    assert len(noised) == len(trained) > 0
    squares = sum(group.threshold**2 for group in groups)
    assert squares == pytest.approx(config.dp_clip_norm**2)
    if config.dp_release == "frozen-b":  # else all is trained in the release path
        assert row.trained - released.trained == {Role.B}
    else:
        assert row == released
    private_step(model.model, groups)
    # One more parameter that learns, and the step is refused with its name.
    frozen = next(p for n, p in model.model.named_parameters() if not p.requires_grad)
    frozen.requires_grad_(True)
    try:
        with pytest.raises(PrivacyError, match="trained without noise"):
            private_step(model.model, groups)
    finally:
        frozen.requires_grad_(False)
    for group in groups:
        rest = [each for each in groups if each is not group]
        with pytest.raises((PrivacyError, ValueError)):
            private_step(model.model, rest)


@pytest.mark.parametrize(
    "options",
    [
        {"method": "fedavg"},
        {"method": "ffa"},
        {"method": "feddpa"},
        {"method": "fedsa", "head": "shared"},
        {"method": "fedavg", "dp_unit": "client"},
    ],
    ids=lambda options: "-".join(options.values()),
)
def test_other_methods_run_with_noise_too(
    federation: MakeFederation, options: dict[str, Any]
) -> None:
    made = federation(**PRIVATE, method=options["method"])
    run = made.simulate("run", **options)
    method = find_method(options["method"], options.get("head", "local"))
    for name in made.model.names(method.shared):
        assert not torch.equal(run.shared[name], made.model.initial[name])
    assert run.records[0].loss is None
    tensors = run.client_tensors(0)
    for name in made.model.names(method.personal):
        assert not torch.equal(tensors[name], made.model.initial[name])


def test_frozen_b_stays_at_its_public_start_in_the_release_path(federation: MakeFederation) -> None:
    made = federation(**PRIVATE, dp_release="frozen-b")
    run = made.simulate("run")
    kept = run._store.get(0)
    names = made.model.names([Role.B])
    assert not set(names) & set(kept.twin)
    for name in names:  # orthonormal columns, and personal training moved them on
        start = made.model.initial[name].double()
        torch.testing.assert_close(start.T @ start, torch.eye(start.shape[1], dtype=start.dtype))
        assert not torch.equal(kept.personal[name].double(), start)


def test_the_noise_is_that_of_the_plan_or_more(federation: MakeFederation) -> None:
    """A multiplier that the user gives is checked against dp_epsilon before the run."""
    config = federation(**PRIVATE).config.replace(rounds=50, dp_noise_multiplier=0.6)
    with pytest.raises(PrivacyError, match="dp_noise_multiplier.*more than dp_epsilon"):
        calibrated(config, 10)
    found = calibrated(config.replace(dp_noise_multiplier=None), 10)
    assert Mechanism.of(config.replace(dp_noise_multiplier=found), 10).epsilon(50) <= 8.0
    assert Mechanism.of(config.replace(dp_noise_multiplier=0.98 * found), 10).epsilon(50) > 8.0
    with pytest.raises(ConfigError):
        config.replace(dp_noise_multiplier=0.0)


@pytest.mark.parametrize(
    "option",
    [{"dp_unit": "client"}, {"dp_delta": 1e-6}, {"dp_release": "frozen-b"}, {"dp_test_seed": 1}],
)
def test_options_of_privacy_without_epsilon_are_refused(option: dict[str, Any]) -> None:
    """Whoever gives one believes that the run is private."""
    with pytest.raises(ConfigError, match="needs dp_epsilon; without it nothing is private"):
        TrainConfig.build(**option)
