"""Attacks on our own promise: how much ε do they prove, beside what is claimed? docs/privacy.md."""

from fedsa_secure.audit.bounds import Finding, audit_two_worlds, largest_rate, most_provable
from fedsa_secure.audit.deterministic import largest_difference
from fedsa_secure.audit.hidden_state import audit_hidden_state
from fedsa_secure.audit.mechanism import audit_mechanism
from fedsa_secure.audit.noise import NoiseFinding, audit_noise
from fedsa_secure.audit.one_run import guesses_needed, most_provable_in_one_run, one_run_epsilon
from fedsa_secure.audit.report import points_of, rows_of
from fedsa_secure.audit.run import RunFinding, audit_run
from fedsa_secure.audit.tiny_clients import ClientTraining
from fedsa_secure.audit.tiny_training import Records, RecordTraining, Setting, Training

__all__ = [
    "ClientTraining",
    "Finding",
    "NoiseFinding",
    "RecordTraining",
    "Records",
    "RunFinding",
    "Setting",
    "Training",
    "audit_hidden_state",
    "audit_mechanism",
    "audit_noise",
    "audit_run",
    "audit_two_worlds",
    "guesses_needed",
    "largest_difference",
    "largest_rate",
    "most_provable",
    "most_provable_in_one_run",
    "one_run_epsilon",
    "points_of",
    "rows_of",
]
