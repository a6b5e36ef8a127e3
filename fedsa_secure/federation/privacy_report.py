"""What a private run promises, in numbers and in words."""

from pydantic import BaseModel, ConfigDict


class PrivacyReport(BaseModel):
    """The promise of a run, as far as it got.

    Args:
        epsilon: certified, of the client that released most; None if noise was not secret.
        delta: probability that it does not cover.
        unit: who is protected.
        release: what is trained with noise.
        noise: where it is added.
        noise_multiplier: σ.
        clip_norm: C.
        sampling_rate: of records.
        steps: noised releases of the client with most of them.
        colluders: c that distributed noise allows for, else None.
        survivors: m that it needs, else None.
        by_client: certified ε of every client in this run.
        lifetime: certified ε of a record of every data set over all runs.
        stopped: why the run ended early, or None.
        statement: all of it in words.
    """

    model_config = ConfigDict(frozen=True)

    epsilon: float | None
    delta: float
    unit: str
    release: str
    noise: str
    noise_multiplier: float
    clip_norm: float
    sampling_rate: float
    steps: int
    colluders: int | None = None
    survivors: int | None = None
    by_client: dict[int, float]
    lifetime: dict[str, float]
    stopped: str | None = None
    statement: str = ""


NOT_COVERED = (
    "Not covered: the personal B and head, which stay with the client; metrics a client chooses to "
    "publish, and the scores that a simulation prints; settings chosen by looking at scores; "
    "sizes, timing, participation, errors; the gap between floating-point and ideal noise."
)


CLAIM = (
    "For every client k, all that client k sends during this run is (ε_k, δ)-DP {change}, "
    "{against}, given public starting weights."
)
RECORD = "when one of its records is replaced by a null record"
EVERYBODY = (
    "against the server, the other clients and anyone who sees the result, even if all of them "
    "collude"
)
PROMISE = " ".join((CLAIM.format(change=RECORD, against=EVERYBODY), NOT_COVERED))
"""The promise of the default, without numbers."""


def statement(report: PrivacyReport) -> str:
    """The promise in words, with everything that it does not say."""
    if report.epsilon is None:
        return (
            "NOT PRIVATE: coins and noise came from dp_test_seed, which is for tests. Whoever "
            "knows the seed can remove the noise."
        )
    change = RECORD if report.unit == "record" else "when the client is replaced by any other"
    claim = CLAIM.format(change=change, against=_against(report))
    numbers = f"Run ε = max_k ε_k = {report.epsilon:.4g} at δ = {report.delta:g}"
    spent = max(report.lifetime.values(), default=report.epsilon)
    if report.lifetime:
        numbers += f"; lifetime ε of a record of its data sets so far: at most {spent:.4g}"
    group = (
        "A person with records at m clients, or with several records, gets group privacy, which is "
        "weaker."
    )
    return " ".join((claim, numbers + ".", NOT_COVERED, group))


def _against(report: PrivacyReport) -> str:
    if report.noise == "distributed":
        return (
            f"against the server with at most {report.colluders} colluding clients, "
            f"computationally, with at least {report.survivors} survivors in every sum"
        )
    return EVERYBODY
