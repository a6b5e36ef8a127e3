"""Attacks on our own promise: how much ε do they prove, beside what is claimed? docs/privacy.md."""

from fedsa_secure.audit.bounds import Finding, audit_two_worlds, largest_rate, most_provable

__all__ = ["Finding", "audit_two_worlds", "largest_rate", "most_provable"]
