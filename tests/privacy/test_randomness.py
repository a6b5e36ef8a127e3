"""Secret coins and noise: the right distributions, each block once, and nothing shown.

Statistical tests have fixed secrets, so their outcome is fixed; a right implementation fails one
with probability 10⁻⁶ over the choice of the secret.
"""

import copy
import pickle

import numpy as np
import pytest
from rich.pretty import pretty_repr
from scipy import stats

from fedsa_secure.csprng import BLOCK, Block, Keystream
from fedsa_secure.errors import PrivacyError
from fedsa_secure.privacy.randomness import LARGEST_GAUSSIAN, TurnSecret, representable_rate
from fedsa_secure.privacy.skellam import SMALLEST_VARIANCE, SkellamTable, skellam_table

FALSE_ALARM = 1e-6
DRAWS = 200_000


def turn(seed: int = 0, client: int = 0, round_number: int = 0) -> TurnSecret:
    return TurnSecret.for_tests(seed, client, round_number)


def test_noise_is_standard_normal() -> None:
    noise = turn().gaussian("noise", DRAWS)
    assert stats.kstest(noise, "norm").pvalue > FALSE_ALARM
    counts = np.bincount((stats.norm.cdf(noise) * 200).astype(int), minlength=200)
    assert stats.chisquare(counts).pvalue > FALSE_ALARM
    squares = float(noise @ noise)
    assert FALSE_ALARM < stats.chi2.cdf(squares, DRAWS) < 1 - FALSE_ALARM


def test_tails_of_the_noise_are_symmetric_and_bounded() -> None:
    # The least and the largest uniforms that there are; one more would be infinite.
    words = np.array([0, 0x80000000, 0xFFFFFFFF, 0x7FFFFFFF], dtype="<u4")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "fedsa_secure.csprng.Keystream.words", lambda *_: words[[0, 0, 0, 1, 2, 2, 2, 3]]
        )
        zero, low, negative_zero, high = turn().gaussian("noise", 4)
    assert (low, high) == (pytest.approx(0, abs=1e-15), pytest.approx(0, abs=1e-15))
    assert zero == LARGEST_GAUSSIAN == -negative_zero
    assert stats.norm.sf(LARGEST_GAUSSIAN) == pytest.approx(2.0**-54)


def test_coins_have_the_rate_that_is_reported() -> None:
    rate = representable_rate(0.037)
    heads = int(turn().coins("coins", DRAWS, 0.037).sum())
    assert stats.binomtest(heads, DRAWS, rate).pvalue > FALSE_ALARM


@pytest.mark.parametrize("rate", [0.1, 1 / 3, 2.0**-33, 0.25, 1.0])
def test_rate_is_rounded_up_to_a_word(rate: float) -> None:
    used = representable_rate(rate)
    assert rate <= used < rate + 2.0**-32
    assert used * 2**32 == int(used * 2**32)
    assert representable_rate(used) == used


def test_coin_is_true_for_exactly_its_share_of_words() -> None:
    rate = 5 * 2.0**-32
    words = np.array([0, 4, 5, 2**32 - 1], dtype="<u4")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedsa_secure.csprng.Keystream.words", lambda *_: words)
        assert turn().coins("coins", 4, rate).tolist() == [True, True, False, False]
        assert turn().coins("coins", 4, rate - 2.0**-40).tolist() == [True, True, False, False]
        assert turn().coins("coins", 4, 1.0).all()


@pytest.mark.parametrize("rate", [0.0, -0.1, 1.1, float("nan")])
def test_impossible_rate_is_refused(rate: float) -> None:
    with pytest.raises(ValueError, match="probability"):
        turn().coins("coins", 1, rate)


def test_integer_noise_has_its_variance() -> None:
    table = skellam_table(SMALLEST_VARIANCE)
    noise = turn().discrete("noise", table, DRAWS).astype(float)
    squares = float(noise @ noise) / table.variance
    assert FALSE_ALARM < stats.chi2.cdf(squares, DRAWS) < 1 - FALSE_ALARM


def test_blocks_of_labels_clients_and_rounds_are_independent() -> None:
    table = SkellamTable(SMALLEST_VARIANCE)
    blocks = [turn(client=client).gaussian("a", DRAWS) for client in range(3)]
    blocks += [turn(round_number=1).gaussian("a", DRAWS), turn(seed=1).gaussian("a", DRAWS)]
    blocks += [turn().gaussian("b", DRAWS), turn().coins("a", DRAWS, 0.5).astype(float)]
    blocks += [turn().discrete("a", table, DRAWS).astype(float)]
    blocks += [np.roll(blocks[0], BLOCK // 2), np.roll(blocks[0], 1)]  # no block comes twice
    correlations = np.corrcoef(blocks)[np.triu_indices(len(blocks), 1)]
    pairs = len(correlations)
    assert np.abs(correlations).max() < stats.norm.isf(FALSE_ALARM / 2 / pairs) / np.sqrt(DRAWS)


def test_kinds_with_one_label_have_different_streams() -> None:
    words = Keystream(turn().key("a")).words(256, Block())
    coins = turn().coins("a", 256, 0.5)
    assert 64 < int((coins == (words < 2**31)).sum()) < 192  # all, were it one stream


def test_block_does_not_depend_on_what_was_drawn_before() -> None:
    first, second = turn(), turn()
    first.gaussian("other", 5)
    np.testing.assert_array_equal(first.gaussian("a", 9), second.gaussian("a", 9))


@pytest.mark.parametrize("kind", ["gaussian", "coins", "key", "discrete"])
def test_label_is_used_once(kind: str) -> None:
    secret, table = turn(), skellam_table(SMALLEST_VARIANCE)
    arguments = {"gaussian": (3,), "coins": (3, 0.5), "key": (), "discrete": (table, 3)}[kind]
    getattr(secret, kind)("a", *arguments)
    getattr(secret, kind)("b", *arguments)
    with pytest.raises(PrivacyError, match="'a'.*drawn before"):
        getattr(secret, kind)("a", *arguments)


def test_secret_can_be_neither_stored_nor_copied() -> None:
    for make in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(PrivacyError, match="neither stored nor copied"):
            make(turn())


def test_fresh_secrets_differ_and_are_private() -> None:
    first, second = TurnSecret.fresh(), TurnSecret.fresh()
    assert first.private
    assert second.private
    assert not turn().private
    assert first.id != second.id
    assert first.key("a") != second.key("a")


def test_test_secrets_are_told_apart_and_repeat() -> None:
    turns = [(seed, client, number) for seed in (0, 1) for client in (0, 1) for number in (0, 1)]
    assert len({turn(*numbers).id for numbers in turns}) == len(turns)
    assert turn(5, 6, 7).key("a") == turn(5, 6, 7).key("a")


def test_nothing_shows_the_secret() -> None:
    known = bytes(range(100, 132))
    secret = TurnSecret(known, private=True)
    keys = [known, secret.key("a")]
    shown = f"{secret!r} {secret} {pretty_repr(secret)} {secret.id}"
    with pytest.raises(PrivacyError) as caught:
        secret.key("a")
    shown += f"{caught.value!r} {vars(caught.value)}"
    for key in keys:
        for form in (key[:8].hex(), repr(key[:8])[2:-1], str(list(key[:8]))[1:-1]):
            assert form not in shown
    assert secret.id in repr(secret)
    assert len(secret.id) == 32
