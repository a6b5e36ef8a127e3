"""Is the noise of the promised size, and is every value of it independent of the others?

Two-sided tests: noise that is too small breaks the promise, and noise that is too large is a bug as
well. What is tested has to be noise alone, of steps that saw no data.
"""

from typing import Literal

import numpy as np
from jaxtyping import Float64
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, computed_field
from scipy.stats import chi2, t

_LEAST = 1e-300


class NoiseFinding(BaseModel):
    """What a test of noise found out.

    Args:
        name: what was tested.
        value: the statistic.
        low: least value that good noise has.
        high: largest value that good noise has.
        samples: numbers that were tested.
        false_alarm: largest probability that the noise is good and the value outside.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    value: float
    low: float
    high: float
    samples: int
    false_alarm: float

    @computed_field  # type: ignore[prop-decorator]
    @property
    def verdict(self) -> Literal["holds", "violated"]:
        """Whether the noise is as promised."""
        return "holds" if self.low <= self.value <= self.high else "violated"


def audit_variance(
    noise: Float64[NDArray[np.float64], "..."],
    deviation: float,
    false_alarm: float = 1e-3,
    *,
    name: str = "noise: variance over the promised one",
) -> NoiseFinding:
    """Chi-square test that noise has mean zero and the promised standard deviation.

    Exact for Gaussian noise; Skellam noise of a variance above 2²⁶ has the same fourth moment
    within 10⁻⁷.

    Args:
        noise: independent values, in any shape.
        deviation: what is promised.
        false_alarm: probability of refusing good noise.
        name: of the finding.
    """
    values = np.asarray(noise, np.float64).ravel() / deviation
    low, high = chi2.ppf([false_alarm / 2, 1 - false_alarm / 2], len(values)) / len(values)
    return NoiseFinding(
        name=name,
        value=float(np.mean(values**2)),
        low=float(low),
        high=float(high),
        samples=len(values),
        false_alarm=false_alarm,
    )


def audit_correlation(
    noise: Float64[NDArray[np.float64], "variable sample"],
    false_alarm: float = 1e-3,
    *,
    name: str = "noise: largest correlation",
) -> NoiseFinding:
    """Largest correlation, in magnitude, between any two rows, against its quantile.

    The correlation of two independent normal samples of n values follows from Student's law with
    n − 2 degrees of freedom; the false-alarm rate is divided by the number of pairs (Bonferroni).

    Args:
        noise: one row for each of at least two variables.
        false_alarm: probability of refusing independent noise.
        name: of the finding.

    Raises:
        ValueError: if there are fewer than two rows or three values in them.
    """
    variables, samples = noise.shape
    if variables < 2 or samples < 3:
        raise ValueError("a correlation needs two variables and three samples")
    centred = noise - noise.mean(1, keepdims=True)
    centred /= np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), _LEAST)
    pairs = np.abs(centred @ centred.T)[np.triu_indices(variables, 1)]
    # Rows without any noise are as dependent as can be.
    silent = not np.all(np.any(centred, axis=1))
    tail = float(t.isf(false_alarm / (2 * len(pairs)), samples - 2))
    return NoiseFinding(
        name=name,
        value=1.0 if silent else float(pairs.max()),
        low=0.0,
        high=tail / float(np.sqrt(samples - 2 + tail**2)),
        samples=samples,
        false_alarm=false_alarm,
    )


def audit_noise(
    noise: Float64[NDArray[np.float64], "round client value"],
    deviation: float,
    false_alarm: float = 1e-3,
    *,
    name: str = "noise",
) -> list[NoiseFinding]:
    """Variance, and correlations between clients, coordinates and rounds.

    Args:
        noise: of every round, client and coordinate.
        deviation: standard deviation that is promised for each.
        false_alarm: of each of the four findings.
        name: what they begin with.
    """
    rounds, clients, values = noise.shape
    by = {
        "clients": noise.transpose(1, 0, 2).reshape(clients, -1),
        "coordinates": noise.transpose(2, 0, 1).reshape(values, -1),
        "rounds": noise.reshape(rounds, -1),
    }
    found = [audit_variance(noise, deviation, false_alarm, name=f"{name}: variance over promised")]
    for axis, rows in by.items():
        label = f"{name}: largest correlation of {axis}"
        found.append(audit_correlation(rows, false_alarm, name=label))
    return found
