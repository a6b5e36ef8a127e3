"""Given what was noised, one record moves a clipped sum by at most C; not so in the naive way."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from unsound_training import Naive, NaiveAdam, SumsThatStay, UnclippedHead

from fedsa_secure.audit import ClientTraining, Records, RecordTraining, Setting, largest_difference
from fedsa_secure.audit.hidden_state import clipped_record, hidden_record
from fedsa_secure.errors import PrivacyError
from fedsa_secure.privacy import DiscreteNoise, TurnSecret

ROUNDING = 1 + 1e-9
DISCRETE = DiscreteNoise.of(1.0, 1.0, 1, 6)


@st.composite
def worlds(draw: st.DrawFn, frozen_b: bool = False) -> tuple[Setting, Records, Records]:
    """Random public constants and two neighbouring data sets; the canary may be enormous."""
    stream = np.random.default_rng(draw(st.integers(0, 2**32)))
    count, tokens = draw(st.integers(1, 5)), draw(st.integers(1, 3))

    def normal(*shape: int) -> torch.Tensor:
        return torch.from_numpy(stream.normal(size=shape))

    B = draw(st.sampled_from([0.0, 1.0, 100.0])) * normal(2, 2)
    setting = Setting(
        A=normal(2, 3),
        B=B,
        head=normal(1, 2),
        frozen_b=frozen_b,
        steps=3,
        sampling_rate=draw(st.sampled_from([1.0, 0.5])),
        rate=draw(st.sampled_from([0.01, 1.0])),
        optimizer=draw(st.sampled_from(["sgd", "adamw"])),
        part=draw(st.sampled_from([None, 2])),
    )
    lengths = torch.from_numpy(stream.integers(1, tokens + 1, count).astype(float))
    real = torch.arange(tokens) < lengths.unsqueeze(1)
    scale = torch.ones(count, dtype=torch.float64)
    scale[0] = draw(st.sampled_from([0.1, 1e3, 1e160]))
    inputs = normal(count, tokens, 3) * real.unsqueeze(2) * scale.view(-1, 1, 1)
    records = Records(inputs, normal(count, tokens) * real * 10, lengths)
    return setting, records, records.without(0)


def secrets(count: int = 1) -> list[TurnSecret]:
    return [TurnSecret.for_tests(0, client, 0) for client in range(count)]


def difference(
    start: Callable[..., RecordTraining | ClientTraining],
    setting: Setting,
    first: Records,
    second: Records,
    steps: int = 2,
) -> float:
    return largest_difference(
        start(setting, first, secrets()), start(setting, second, secrets()), steps
    )


@settings(max_examples=200)
@given(worlds())
def test_the_twin_stays_within_c(case: tuple[Setting, Records, Records]) -> None:
    assert difference(RecordTraining, *case) <= case[0].clip_norm * ROUNDING


@settings(max_examples=200)
@given(worlds(frozen_b=True))
def test_a_frozen_b_stays_within_c(case: tuple[Setting, Records, Records]) -> None:
    assert difference(RecordTraining, *case) <= case[0].clip_norm * ROUNDING


@settings(max_examples=200)
@given(worlds())
def test_a_client_stays_within_2c(case: tuple[Setting, Records, Records]) -> None:
    def start(*args: object) -> ClientTraining:
        return ClientTraining(*args, local_steps=2)

    assert difference(start, *case) <= 2 * case[0].clip_norm * ROUNDING


@settings(max_examples=200)
@given(worlds())
def test_a_rounded_client_stays_within_its_sensitivity(
    case: tuple[Setting, Records, Records],
) -> None:
    def start(*args: object) -> ClientTraining:
        return ClientTraining(*args, discrete=DISCRETE, local_steps=2)

    assert difference(start, *case) <= DISCRETE.sensitivity_l2 * DISCRETE.step * ROUNDING


@pytest.mark.parametrize("frozen_b", [False, True])
def test_the_worst_case_reaches_c(frozen_b: bool) -> None:
    case = clipped_record(frozen_b=frozen_b)
    found = difference(RecordTraining, case.setting, case.present, case.without, 4)
    assert found == pytest.approx(1.0, rel=1e-6)


@pytest.mark.parametrize("start", [Naive, NaiveAdam])
def test_the_naive_construction_fails(start: type[RecordTraining]) -> None:
    # All twenty ordinary records turn with B.
    case = hidden_record()
    assert difference(start, case.setting, case.present, case.without) > 10
    assert difference(RecordTraining, case.setting, case.present, case.without) <= ROUNDING


def test_sums_that_are_not_cleared_fail() -> None:
    case = clipped_record()
    assert difference(SumsThatStay, case.setting, case.present, case.without, 3) > 2.9


def test_an_unclipped_head_fails() -> None:
    case = hidden_record(frozen_b=True)
    assert difference(UnclippedHead, case.setting, case.present, case.without) > 5


def test_the_private_step_refuses_the_naive_construction() -> None:
    class Careless(RecordTraining):
        def noised_parameters(self) -> dict[str, torch.nn.Parameter]:
            return {"A": self.model.adapter.A}

    case = hidden_record()
    with pytest.raises(PrivacyError, match="without noise"):
        Careless(case.setting, case.present, secrets())


def test_worlds_that_noise_different_things_are_refused() -> None:
    case = hidden_record()
    frozen = replace(case.setting, frozen_b=True)
    first = RecordTraining(case.setting, case.present, secrets())
    second = RecordTraining(frozen, case.present, secrets())
    with pytest.raises(ValueError, match="different"):
        largest_difference(first, second, 1)
