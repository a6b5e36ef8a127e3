"""The error tree: one base class per thing the caller can do about it.

FedSAError
  ConfigError         an option, a column or a file the caller named is wrong (also ValueError)
  AdapterError        the adapter does not fit the model it is attached to
  CheckpointError     a run folder is unreadable, foreign or cannot be written
  DivergedError       a client's training left the finite numbers
  MissingExtraError   an optional dependency is not installed (also ImportError)
"""

import difflib
from collections.abc import Iterable


class FedSAError(Exception):
    """Base of every error this library raises on purpose."""


class ConfigError(FedSAError, ValueError):
    """An option is unknown or its value is impossible.

    Args:
        option: the option, as it is spelt in ``TrainConfig``.
        problem: what was given and what was expected.
        remedy: what to do about it.
    """

    def __init__(self, option: str, problem: str, remedy: str = "") -> None:
        self.option = option
        super().__init__(f"{option}: {problem}" + (f"; {remedy}" if remedy else ""))


class AdapterError(FedSAError):
    """An adapter cannot work on the module it was attached to."""


class CheckpointError(FedSAError):
    """A run folder cannot be read, does not belong to this run, or cannot be written."""


class DivergedError(FedSAError):
    """A client's loss or update is not finite; nothing of that round is kept."""


class MissingExtraError(FedSAError, ImportError):
    """A package of an optional extra is needed but not installed.

    Args:
        package: the missing distribution.
        extra: the extra of ``fedsa-secure`` that brings it.
    """

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(
            f"the package {package} is not installed; "
            f'run: python -m pip install "fedsa-secure[{extra}]"'
        )


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Say which names are possible, the nearest one first.

    Returns:
        A phrase for the remedy of an error, such as ``did you mean 'query'? (possible: …)``.
    """
    possible = sorted(set(known))
    nearest = difflib.get_close_matches(name, possible, n=1, cutoff=0.5)
    shown = ", ".join(possible[:20]) + (", …" if len(possible) > 20 else "")
    hint = f"did you mean {nearest[0]!r}? " if nearest else ""
    return f"{hint}(possible: {shown})"
