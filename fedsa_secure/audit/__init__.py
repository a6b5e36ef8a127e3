"""Attacks on our own promise: how much ε do they prove, beside what is claimed? docs/privacy.md."""

from fedsa_secure.audit.bounds import Finding, audit_two_worlds, largest_rate, most_provable
from fedsa_secure.audit.deterministic import largest_difference
from fedsa_secure.audit.hidden_state import audit_hidden_state
from fedsa_secure.audit.tiny_clients import ClientTraining
from fedsa_secure.audit.tiny_training import Records, RecordTraining, Setting, Training

__all__ = [
    "ClientTraining",
    "Finding",
    "RecordTraining",
    "Records",
    "Setting",
    "Training",
    "audit_hidden_state",
    "audit_two_worlds",
    "largest_difference",
    "largest_rate",
    "most_provable",
]
