"""Differential privacy: mechanisms, accounting and ledgers. docs/privacy.md."""

from fedsa_secure.privacy.accounting import (
    Event,
    certified_epsilon,
    gaussian_delta,
    gaussian_epsilon,
    noise_multiplier_for,
    prv_epsilon,
)
from fedsa_secure.privacy.client_level import clipped_update, gaussian_update
from fedsa_secure.privacy.discrete import (
    DiscreteNoise,
    noise_multiplier_for_rounds,
    skellam_epsilon_of,
)
from fedsa_secure.privacy.guard import (
    refuse_dependent_rows,
    refuse_mixing,
    refuse_shared_gradients,
)
from fedsa_secure.privacy.ledger import (
    DataSetLedger,
    Ledger,
    LedgerEvent,
    home_folder,
    require_budget,
    spent,
)
from fedsa_secure.privacy.optimizer import ClientDPOptimizer, ClipGroup
from fedsa_secure.privacy.private_step import PartialBatch, PrivateStep
from fedsa_secure.privacy.randomness import LARGEST_GAUSSIAN, TurnSecret, representable_rate
from fedsa_secure.privacy.sampler import SecretPoissonSampler

__all__ = [
    "LARGEST_GAUSSIAN",
    "ClientDPOptimizer",
    "ClipGroup",
    "DataSetLedger",
    "DiscreteNoise",
    "Event",
    "Ledger",
    "LedgerEvent",
    "PartialBatch",
    "PrivateStep",
    "SecretPoissonSampler",
    "TurnSecret",
    "certified_epsilon",
    "clipped_update",
    "gaussian_delta",
    "gaussian_epsilon",
    "gaussian_update",
    "home_folder",
    "noise_multiplier_for",
    "noise_multiplier_for_rounds",
    "prv_epsilon",
    "refuse_dependent_rows",
    "refuse_mixing",
    "refuse_shared_gradients",
    "representable_rate",
    "require_budget",
    "skellam_epsilon_of",
    "spent",
]
