"""Differential privacy: mechanisms per record and per client, accounting, ledgers. docs/privacy.md."""
