"""The command line. The only place that prints."""

from fedsa_secure.cli.commands import app, main

__all__ = ["app", "main"]
