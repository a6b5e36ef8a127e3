"""What a private run promises, in numbers and in words."""

from pydantic import BaseModel, ConfigDict

from fedsa_secure.config import TrainConfig


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
        by_client: certified ε of every client in this run.
        lifetime: certified ε of every data set over all runs.
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
    by_client: dict[int, float]
    lifetime: dict[str, float]
    stopped: str | None = None
    statement: str = ""


NOT_COVERED = (
    "Not covered: the personal B and head, which stay with the client; metrics a client chooses to "
    "publish, and the scores that a simulation prints; sizes, timing, participation; the gap "
    "between floating-point and ideal noise."
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


def statement(report: PrivacyReport, config: TrainConfig) -> str:
    """The promise in words, with everything that it does not say."""
    if report.epsilon is None:
        return (
            "NOT PRIVATE: coins and noise came from dp_test_seed, which is for tests. Whoever "
            "knows the seed can remove the noise."
        )
    change = RECORD if report.unit == "record" else "when the client is replaced by any other"
    claim = CLAIM.format(change=change, against=_against(report, config))
    numbers = f"Run ε = max_k ε_k = {report.epsilon:.4g} at δ = {report.delta:g}"
    spent = max(report.lifetime.values(), default=report.epsilon)
    if report.lifetime:
        numbers += f"; lifetime ε of its data sets so far: at most {spent:.4g}"
    group = (
        "A person with records at m clients, or with several records, gets group privacy, which is "
        "weaker."
    )
    return " ".join((claim, numbers + ".", NOT_COVERED, group))


def _against(report: PrivacyReport, config: TrainConfig) -> str:
    if report.noise == "distributed":
        given = config.colluders
        most = "the assumed number of" if given is None else f"at most {given}"
        return (
            f"against the server with {most} colluding clients, computationally, with at least the "
            "minimum of survivors in every sum"
        )
    return EVERYBODY
