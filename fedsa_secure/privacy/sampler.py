"""Which records take part in a step: Poisson sampling with secret coins."""

from collections.abc import Iterator

from opacus.utils.uniform_sampler import UniformWithReplacementSampler

from fedsa_secure.privacy.randomness import TurnSecret, representable_rate


class SecretPoissonSampler(UniformWithReplacementSampler):  # type: ignore[misc]
    """Opacus' Poisson sampler with coins of the operating system instead of a torch generator.

    Every record is in a step with probability ``sample_rate``, independently of all others, as the
    accountant of the subsampled Gaussian mechanism assumes (Abadi et al., CCS 2016, §3; Mironov,
    Talwar, Zhang, 2019, §3). Batches are never cut, filled or shuffled. Amplification by sampling
    needs that nobody sees who was drawn, so the coins may not come from the run's seed.

    It can be iterated once: a second pass would reuse its coins and raises ``PrivacyError``.

    Args:
        secret: of the turn.
        records: size of the shard n_k, a public number.
        sampling_rate: probability of a record; rounded up by ``representable_rate``.
        steps: how many batches.
        first_step: number of the first step within the turn; names the coins.

    Raises:
        ValueError: if there are no records, or the rate is not in (0, 1].
    """

    sample_rate: float
    """The probability that is really used; the accountant takes this one."""
    num_samples: int
    steps: int

    def __init__(
        self,
        secret: TurnSecret,
        records: int,
        sampling_rate: float,
        steps: int,
        first_step: int = 0,
    ) -> None:
        super().__init__(
            num_samples=records, sample_rate=representable_rate(sampling_rate), steps=steps
        )
        self._secret = secret
        self._first_step = first_step

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the places of the records of each step, in order; a batch may be empty."""
        for step in range(self._first_step, self._first_step + self.steps):
            coins = self._secret.coins(f"step {step}", self.num_samples, self.sample_rate)
            yield coins.nonzero()[0].tolist()
