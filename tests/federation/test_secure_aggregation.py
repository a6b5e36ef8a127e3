"""Runs through the protocol: what they equal, what the server gets, what failures do to them."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedsa_secure import ConfigError
from fedsa_secure.federation import secure_aggregation
from fedsa_secure.federation.aggregation import Contribution, Outcome
from fedsa_secure.federation.dropouts import Dropouts, Step
from fedsa_secure.federation.encoding import Layout
from fedsa_secure.federation.masked_vector import LOSS_RANGE, MaskedVector
from fedsa_secure.federation.run_folder import RunFolder
from fedsa_secure.federation.secure_aggregation import SecureAggregation, check_options
from fedsa_secure.methods import find_method
from fedsa_secure.runtimes.simulation import Simulation
from fedsa_secure.secagg import FixedPoint, ServerSession, client
from fedsa_secure.secagg.wire import MaskedInput, decode_client

MakeFederation = Callable[..., Any]


@pytest.fixture(scope="module")
def four(federation: MakeFederation) -> Any:
    """Four clients, three rounds."""
    return federation(rounds=3)


def in_the_clear(
    self: SecureAggregation,
    number: int,
    cohort: list[int],
    next_cohort: object,
    shared: dict[str, torch.Tensor],
    contribute: Callable[..., Iterator[Contribution]],
) -> Outcome:
    """The same coins, the sum of integers without masks: no session, no keys."""
    vector, bound = self._vector, self._range(number, shared)
    total = np.zeros(vector.size, dtype=np.uint64)
    for each in contribute(cohort):
        encoded = np.empty(vector.size, dtype=np.uint32)
        vector.write(each, number, bound, encoded)
        total += encoded
    assert int(total.max()) < 2**32  # nothing wraps
    opened = vector.open(total.astype(np.uint32), len(cohort), bound)
    return Outcome(opened.mean, opened.loss, tuple(cohort), opened.clipped)


@pytest.mark.parametrize(
    "options",
    [
        {"method": "fedsa"},
        {"method": "fedavg", "participation": 0.75},
        {"method": "ffa", "optimizer": "sgd", "learning_rate": 0.05},
        {"method": "fedsa", "head": "shared", "threat": "honest-but-curious"},
        {"method": "fedsa", "weighting": "samples", "weight_cap": 30},
        {"method": "fedsa", "mask_generator": "chacha20"},
    ],
    ids=lambda options: "-".join(str(value) for value in options.values()),
)
def test_a_run_is_bit_for_bit_the_one_that_sums_in_the_clear(
    four: Any, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    name = "-".join(str(value) for value in options.values())
    secure = four.simulate(f"{name} secure", **options)
    monkeypatch.setattr(SecureAggregation, "round", in_the_clear)
    clear = four.simulate(f"{name} clear", **options)
    assert secure.records == clear.records
    for number in range(4):
        ours, theirs = secure.client_tensors(number), clear.client_tensors(number)
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_the_mean_is_within_a_step_of_the_plain_one(
    four: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given the same contributions, in every round of a run."""
    compared = []
    real = SecureAggregation.round

    def compare(self: SecureAggregation, number: int, *rest: Any) -> Outcome:
        seen: list[Contribution] = []
        contribute = rest[-1]

        def spy(chosen: list[int]) -> Iterator[Contribution]:
            for each in contribute(chosen):
                seen.append(each)
                yield each

        outcome = real(self, number, *rest[:-1], spy)
        plain = torch.stack([each.update.double() for each in seen]).mean(0)
        grid = FixedPoint(4, self._range(number, rest[2]))
        assert outcome.mean is not None
        assert float((outcome.mean - plain).abs().max()) <= grid.step
        loss = sum(each.loss for each in seen) / 4
        assert outcome.loss == pytest.approx(loss, abs=FixedPoint(4, LOSS_RANGE).step)
        assert not torch.equal(outcome.mean, plain)  # it is not the plain mean that comes back
        compared.append(number)
        return outcome

    monkeypatch.setattr(SecureAggregation, "round", compare)
    four.simulate("within a step", update_range=100.0)
    assert compared == [1, 2, 3]


def test_weights_by_samples_are_those_of_the_clear(four: Any) -> None:
    options = {"weighting": "samples", "weight_cap": 30, "rounds": 1}
    secure = four.simulate("weights secure", **options)
    clear = four.simulate("weights clear", secure_aggregation=False, **options)
    uniform = four.simulate("uniform", rounds=1)
    rows = [len(shard.train) for shard in four.data.shards]
    assert min(rows) < 30 < max(rows)
    sent = list(clear._train(range(4), 1))
    assert [each.weight for each in sent] == [min(count, 30) for count in rows]
    for name, tensor in clear.shared.items():
        torch.testing.assert_close(secure.shared[name], tensor, rtol=0, atol=1e-6)
        assert not torch.allclose(uniform.shared[name], tensor, rtol=0, atol=1e-5)


def test_a_weighted_mean_is_within_its_step_of_the_plain_one() -> None:
    """Weights that are no powers of two below the cap: their products must not round off a step."""
    vector, weights = MaskedVector(values=5000, clients=3, seed=0, weight_cap=30), (29, 17, 23)
    stream = torch.Generator().manual_seed(0)
    updates = [2 * torch.rand(5000, generator=stream) - 1 for _ in weights]
    total = np.zeros(vector.size, dtype=np.uint32)
    for number, (update, weight) in enumerate(zip(updates, weights, strict=True)):
        encoded = np.empty(vector.size, dtype=np.uint32)
        vector.write(Contribution(number, update, 1.0, weight), 1, 1.0, encoded)
        total += encoded
    plain = sum(u.double() * w for u, w in zip(updates, weights, strict=True)) / sum(weights)
    found = vector.open(total, 3, 1.0).mean
    assert float((found - plain).abs().max()) <= FixedPoint(3, 1.0).step * 30 / (sum(weights) / 3)


def test_the_server_gets_nothing_of_one_client(four: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that it receives in a run is searched for plain values of every client."""
    received: list[bytes] = []
    plain: list[tuple[Contribution, np.ndarray]] = []
    receive, write = ServerSession.receive, MaskedVector.write

    def spy_receive(self: ServerSession, data: Any) -> None:
        received.append(bytes(data))
        receive(self, data)

    def spy_write(self: MaskedVector, each: Contribution, *rest: Any) -> None:
        write(self, each, *rest)
        plain.append((each, rest[-1].copy()))

    monkeypatch.setattr(ServerSession, "receive", spy_receive)
    monkeypatch.setattr(MaskedVector, "write", spy_write)
    run = four.simulate("recorded", weighting="samples", weight_cap=30)
    terms = run._aggregation._terms
    vectors = [signed for data in received if len((signed := decode_client(data, terms)).payload)]
    assert len(vectors) == len(plain) == 4 * 3
    everything = b"".join(received)
    for each, encoded in plain:
        for start in range(0, len(encoded) - 4, 101):  # four values in a row never occur by chance
            assert encoded[start : start + 4].tobytes() not in everything
            assert each.update[start : start + 4].numpy().tobytes() not in everything
        assert np.float64(each.loss).tobytes() not in everything
    for signed in vectors:
        assert isinstance(signed.message, MaskedInput)
        own = [encoded for each, encoded in plain if each.client == signed.message.client]
        # Of some thousand words, more than a few equal ones would not be chance.
        assert min(np.count_nonzero(signed.payload == encoded) for encoded in own) <= 3
        assert min(abs(int(signed.payload[-1]) - e.weight) for e, _ in plain) > 1000


def test_no_secret_is_written_or_logged(
    four: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    secrets: list[bytes] = []
    new_secret = client.new_secret

    def spy_secret() -> bytes:
        secrets.append(new_secret())
        return secrets[-1]

    monkeypatch.setattr(client, "new_secret", spy_secret)
    caplog.set_level(logging.DEBUG)
    run = four.simulate("searched", dropouts=("2:1:masked_input", "3:0:unmask"))
    assert len(secrets) == 4 * 3 * 3
    folder = Path(run._folder.path)
    written = [path.read_bytes() for path in folder.rglob("*") if path.is_file()]
    shown = [caplog.text.encode(), repr(run._aggregation.server).encode()]
    shown += [repr(each).encode() for each in run._aggregation._clients.values()]
    for text in written + shown:
        for secret in secrets:
            assert secret not in text
            assert secret.hex().encode() not in text
            assert repr(secret)[2:-1].encode() not in text


@pytest.mark.parametrize(
    ("step", "survives"),
    [
        ("advertise_keys", False),
        ("share_keys", False),
        ("masked_input", False),
        ("consistency", True),
        ("unmask", True),
    ],
)
def test_a_dropout_is_in_the_sum_if_its_vector_is(four: Any, step: str, survives: bool) -> None:
    run = four.simulate(f"drop at {step}", dropouts=(f"2:1:{step}",))
    expected = (0, 1, 2, 3) if survives else (0, 2, 3)
    assert [r.survivors for r in run.records] == [(0, 1, 2, 3), expected, (0, 1, 2, 3)]
    assert {r.attempts for r in run.records} == {1}
    loss = [r.loss for r in run.records]
    assert all(value is not None for value in loss)


@pytest.mark.parametrize("step", ["consistency", "unmask"])
def test_without_signatures_both_last_steps_are_the_reveal(
    federation: MakeFederation, step: str
) -> None:
    made = federation((20, 20, 20), rounds=1, threat="honest-but-curious")
    record = made.simulate(step, dropouts=f"1:0:{step}").records[0]
    assert record.loss is None
    assert record.aborts[0].startswith("TooFewClients: 2 shares of a secret of client 0")


def test_a_dropout_before_the_vector_does_not_train(four: Any) -> None:
    whole = four.simulate("nobody drops", rounds=1)
    partial = four.simulate("one drops", rounds=1, dropouts=("1:1:masked_input",))
    assert whole._store.get(1).steps == 4
    assert partial._store.get(1).steps == 0
    others = four.simulate("the rest", rounds=1, dropouts=("1:1:advertise_keys",))
    assert all(torch.equal(others.shared[n], partial.shared[n]) for n in partial.shared)


def test_a_round_is_tried_again_and_trains_once(federation: MakeFederation) -> None:
    """With three clients nobody may fail; the second attempt has everybody back."""
    made = federation((20, 20, 20), rounds=2)
    run = made.simulate("again", dropouts=("1:2:masked_input",))
    quiet = made.simulate("quiet")
    first = run.records[0]
    assert first.attempts == 2
    assert len(first.aborts) == 1
    assert first.aborts[0].startswith("TooFewClients: 2 vectors arrived, and 3 are needed")
    assert run._store.get(0).steps == quiet._store.get(0).steps
    # Whoever is back trains alone, and not beside the others: some processors round that otherwise.
    torch.testing.assert_close(run.shared, quiet.shared, rtol=0.0, atol=1e-6)


def test_a_lost_round_leaves_the_shared_tensors(federation: MakeFederation) -> None:
    """Who failed to reveal cannot be replaced: the others have closed the round."""
    made = federation((20, 20, 20), rounds=1)
    run = made.simulate("lost", dropouts=("1:0:unmask",))
    record = run.records[0]
    assert record.loss is None
    assert record.survivors == ()
    assert record.attempts == 1
    assert record.aborts[0].startswith("TooFewClients: 2 shares of a secret of client 0")
    for name, tensor in run.shared.items():
        assert torch.equal(tensor, made.model.initial[name])
    assert run._store.get(1).steps == 4  # it trained, and cannot know that it was for nothing


def test_attempts_are_counted_and_given_up(federation: MakeFederation) -> None:
    made = federation((20, 20, 20), rounds=2)
    run = made.simulate("given up", dropouts=0.7, max_attempts=2, seed=3)
    for record in run.records:
        assert record.attempts <= 2
        assert (record.loss is None) == (record.survivors == ())
        assert len(record.aborts) == record.attempts - (record.loss is not None)
    assert any(record.loss is None for record in run.records)


def test_resuming_does_not_change_failures(four: Any) -> None:
    """A run that goes on sets up by itself what had travelled with the round before."""
    options = {"rounds": 6, "dropouts": 0.35, "seed": 5}
    whole = four.simulate("whole", **options)
    config = four.config.replace(output_dir=str(four.folder / "halves"), **options)
    folder = RunFolder.create(config)

    class Interrupt:
        """Stops a run after its third round."""

        def started(self, *_: object) -> None: ...
        def finished(self) -> None: ...
        def round_finished(self, record: Any, _: object) -> None:
            if record.round == 3:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Simulation(config, four.model, four.data, folder, [Interrupt()]).run()
    rest = Simulation(config, four.model, four.data, folder)
    rest.restore()
    rest.run()
    assert any(record.aborts for record in whole.records)
    assert [record.survivors for record in whole.records].count((0, 1, 2, 3)) < 6
    ours, theirs = (Path(r._folder.path) / "history.jsonl" for r in (rest, whole))
    assert ours.read_bytes() == theirs.read_bytes()


def test_keys_that_travel_with_a_second_attempt_are_the_next_rounds_first(
    federation: MakeFederation,
) -> None:
    """They fail as they would in a round that is set up by itself."""
    made = federation((20, 20, 20), rounds=3)
    run = made.simulate("on the way", dropouts="2:0:share_keys,3:1:advertise_keys")
    assert [record.attempts for record in run.records] == [1, 2, 2]
    reasons = [record.aborts[0] for record in run.records[1:]]
    assert reasons[0].startswith("TooFewClients: 2 clients shared their keys")
    assert reasons[1].startswith("TooFewClients: 2 clients sent keys")


def test_the_terms_know_how_many_rounds_there_are(four: Any) -> None:
    """Clients refuse others, and a sparse graph has to be safe in as many as there are."""
    assert four.simulate("terms")._aggregation._terms.rounds == 3
    few, many = (
        secure_aggregation.thresholds_of(four.config.replace(rounds=rounds), 300)
        for rounds in (3, 10_000)
    )
    assert few.neighbours < many.neighbours


def test_keys_that_stayed_away_on_the_way_count_as_an_attempt(federation: MakeFederation) -> None:
    made = federation((20, 20, 20), rounds=2)
    run = made.simulate("only one", dropouts="2:0:share_keys", max_attempts=1)
    assert [record.attempts for record in run.records] == [1, 1]
    assert [record.loss is None for record in run.records] == [False, True]
    assert run.records[1].aborts[0].startswith("TooFewClients: 2 clients shared their keys")


def test_clients_of_another_configuration_have_other_terms(four: Any) -> None:
    """So their masks do not cancel, whatever the server told whom."""
    layout = Layout.of({"A": torch.zeros(2, 3)})
    given = [
        (four.config, layout),
        (four.config.replace(learning_rate=1e-3), layout),
        (four.config.replace(participation=0.75), layout),
        (four.config, Layout.of({"A": torch.zeros(3, 2)})),
    ]
    assert len({secure_aggregation._application(*each) for each in given}) == 4
    moved = four.config.replace(output_dir="elsewhere")
    same = [secure_aggregation._application(each, layout) for each in (four.config, moved)]
    assert same[0] == same[1]


def test_the_generator_of_masks_is_in_the_terms_by_name(four: Any) -> None:
    """And there only: terms that differ in nothing else can be told so."""
    layout, made = Layout.of({"A": torch.zeros(2, 3)}), []
    for name in ("aes-256-ctr", "chacha20"):
        config = four.config.replace(mask_generator=name)
        aggregation = SecureAggregation(config, layout, lambda _: [0, 1, 2, 3], lambda *_: 1.0)
        made.append(aggregation._terms)
    assert [terms.mask_generator for terms in made] == ["aes-256-ctr", "chacha20"]
    assert made[0].hash != made[1].hash
    assert "mask_generator='chacha20'" in made[0].other(made[1].hash)


def test_three_exchanges_a_round(four: Any) -> None:
    run = four.simulate("exchanges")
    assert [t.exchanges for t in run._history.timings().values()] == [5, 3, 3]
    curious = four.simulate("fewer exchanges", threat="honest-but-curious")
    assert [t.exchanges for t in curious._history.timings().values()] == [4, 2, 2]


def test_values_beyond_the_range_are_counted_and_warned_of(
    four: Any, caplog: pytest.LogCaptureFixture
) -> None:
    run = four.simulate("clipped", rounds=1, update_range=1e-4)
    values = sum(t.numel() for t in run.shared.values())
    assert 0 < run.records[0].clipped <= 4 * values
    assert "update_range" in caplog.text
    for name, tensor in run.shared.items():
        moved = (tensor - four.model.initial[name]).abs().max()
        assert float(moved) <= 1e-4 * 2  # the grid ends at the next power of two


def test_the_number_of_clipped_values_cannot_wrap() -> None:
    """With very many clients a place of the vector holds little."""
    vector = MaskedVector(values=5000, clients=2**20, seed=0)
    encoded = np.empty(vector.size, dtype=np.uint32)
    vector.write(Contribution(0, torch.full((5000,), 9.0), 1.0), 1, 1.0, encoded)
    assert int(encoded[-1]) == 2**12 - 1 < 5000


def test_methods_that_share_nothing_need_no_protocol(federation: MakeFederation) -> None:
    run = federation((12, 12), method="local", rounds=1).simulate("local")
    assert run.records[0].uplink_bytes == 0
    assert run.records[0].survivors == (0, 1)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"clients": 2}, "secure_aggregation: it needs at least 3"),
        ({"clients": 9, "participation": 0.2}, "secure_aggregation: it needs at least 3"),
        ({"clients": 9, "threshold": 5}, "threshold: 5 with 9 clients"),
        ({"clients": 9, "threshold": 10}, "threshold: 10 with 9 clients"),
        ({"clients": 9, "colluders": 8}, "colluders: 8 of 9"),
        ({"clients": 9, "min_survivors": 4}, "min_survivors: 4"),
        ({"clients": 9, "min_survivors": 10}, "min_survivors: 10"),
        ({"clients": 9, "optimizer": "sgd", "max_grad_norm": None}, "update_range: nothing bounds"),
        ({"clients": 9, "dropouts": ("1:1",)}, "dropouts: '1:1' is no ROUND:CLIENT:STEP"),
        ({"clients": 9, "dropouts": ("1:1:mask",)}, "dropouts: no step 'mask'.*masked_input"),
        ({"clients": 9, "dropouts": ("1:9:unmask",)}, "dropouts: '1:9:unmask' in a run of"),
        ({"clients": 9, "dropouts": ("0:1:unmask",)}, "dropouts"),
        ({"clients": 9, "dropouts": ""}, "dropouts: give a rate, 0 for none"),
        ({"clients": 9, "dropouts": "none"}, "dropouts: give a rate, 0 for none"),
        ({"clients": 9, "dropouts": [0.1]}, "dropouts: give a rate, 0 for none"),
        ({"clients": 9, "dropouts": "1:2:unmask, 1:2:consistency"}, "client 2 fails twice"),
        (
            {
                "clients": 9,
                "participation": 0.4,
                "dropouts": tuple(f"1:{c}:unmask" for c in range(9)),
            },
            "dropouts: .* is not invited to round 1; invited are",
        ),
        ({"clients": 9, "update_range": float("inf")}, "update_range: input should be less"),
        ({"clients": 9, "weight_decay": 200.0}, "update_range: weight_decay=200 times"),
        (
            {"clients": 5000, "weighting": "samples", "weight_cap": 2**20},
            "weight_cap: 5000 weights of 1048576 do not fit",
        ),
    ],
)
def test_impossible_options_are_refused_by_name(
    four: Any, options: dict[str, Any], named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        check_options(four.config.replace(partition="iid", **options), find_method("fedsa"))


def test_failures_are_drawn_for_every_round_attempt_and_client() -> None:
    drawn = Dropouts(0.5, {}, seed=0)
    places = [(1, 1), (1, 2), (2, 1)]
    found = {at: tuple(drawn.step(*at, client) for client in range(400)) for at in places}
    assert len(set(found.values())) == 3
    for steps in found.values():
        assert set(steps) == {None, *Step}  # the last one is missed with probability 10⁻¹⁹
        assert 150 < steps.count(None) < 250


def test_a_schedule_is_for_the_first_attempt() -> None:
    planned = Dropouts(0.0, {(2, 1): Step.UNMASK}, seed=0)
    asked = [(2, 1, 1), (2, 2, 1), (1, 1, 1), (2, 1, 0)]
    assert [planned.step(*at) for at in asked] == [Step.UNMASK, None, None, None]


def test_nobody_drops_out_of_a_method_that_sends_nothing(four: Any) -> None:
    with pytest.raises(ConfigError, match="dropouts: with method 'local' nothing is sent"):
        check_options(four.config.replace(dropouts=0.5), find_method("local"))
    check_options(four.config.replace(clients=1), find_method("local"))


def test_the_hash_of_public_values_tells_models_and_ranges_apart() -> None:
    shared = {"A": torch.arange(6.0).view(2, 3)}
    moved = {"A": shared["A"].clone()}
    moved["A"][0, 0] = 2.0**-149
    hashes = {
        secure_aggregation.public_values_hash(shared, 0.5),
        secure_aggregation.public_values_hash(moved, 0.5),
        secure_aggregation.public_values_hash(shared, 0.25),
    }
    assert len(hashes) == 3


def test_neighbours_above_a_hundred_clients_do_not_depend_on_keys(four: Any) -> None:
    """Else the same failures would lose a round in one process and not in another."""
    options = [{"seed": 0}, {"seed": 0}, {"seed": 1}]
    runs = [four.simulate(f"session {k}", rounds=1, **each) for k, each in enumerate(options)]
    sids = [run._aggregation.server.sid for run in runs]
    assert sids[0] == sids[1] != sids[2]
