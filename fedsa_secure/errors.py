"""The error tree: one base class per thing the caller can do about it.

FedSAError
  ConfigError         an option, a column or a file the caller named is wrong (also ValueError)
  AdapterError        the adapter does not fit the model it is attached to
  CheckpointError     a run folder is unreadable, foreign or cannot be written
  DivergedError       a client's training left the finite numbers
  MissingExtraError   an optional dependency is not installed (also ImportError)
  IdentityError       a key file or a roster cannot be used
  PrivacyError        an option or a model would break what differential privacy promises
    BudgetExceededError   the next step would spend more than a data set may
  ProtocolError       secure aggregation refused a message or ended a round; see below
    MalformedMessage, OversizedMessage, BadSignature, UnknownClient, WrongTerms, WrongOpening,
    OutOfOrder, ReplayedRound, DuplicateMessage, LateMessage       what came cannot be accepted
    KeySubstitution, BadShare, WrongRebuiltKey                     keys and shares do not fit
    ModelMismatch, InvalidSurvivors, Equivocation, SecondUpdate, RetryForbidden   the server cheats
    TooFewClients, TooFewSignatures                                a threshold is not reached
    SecretsLost                                                    a crash took the secrets
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


class IdentityError(FedSAError):
    """A long-term key or a roster is missing, readable by others, or damaged."""


class PrivacyError(FedSAError):
    """Something would break the promise of differential privacy, or make it mean nothing.

    Args:
        what: the parameter, operator or setting.
        problem: why it may not be.
        remedy: what to do about it.
    """

    def __init__(self, what: str, problem: str, remedy: str = "") -> None:
        self.what = what
        super().__init__(f"{what}: {problem}" + (f"; {remedy}" if remedy else ""))


class BudgetExceededError(PrivacyError):
    """The next step would spend more than a data set's budget; it was not taken."""


class ProtocolError(FedSAError):
    """Secure aggregation refused something; for whoever raised it the attempt is over."""


class MalformedMessage(ProtocolError):
    """Bytes are not the one encoding of a message that fits here (docs/protocol.md §6)."""


class OversizedMessage(MalformedMessage):
    """A message is longer than anything that may come here; it was not decoded."""


class BadSignature(ProtocolError):
    """A message was not signed by the identity that the roster names (docs/protocol.md §6)."""


class UnknownClient(ProtocolError):
    """A client is not on the roster, or has no place in this round."""


class WrongTerms(ProtocolError):
    """A message belongs to other terms or another session (docs/protocol.md §2)."""


class WrongOpening(ProtocolError):
    """Commitments and nonces of a session do not fit each other (docs/protocol.md §7)."""


class OutOfOrder(ProtocolError):
    """A message came at a step that does not expect it, or after the attempt was over."""


class ReplayedRound(ProtocolError):
    """A round is closed, or an attempt of it was begun before (docs/protocol.md §9)."""


class DuplicateMessage(ProtocolError):
    """A client sent a second, different message for one step."""


class LateMessage(ProtocolError):
    """A message came after the server had closed its step; it was dropped unread."""


class KeySubstitution(ProtocolError):
    """Advertised keys are not what their owner sent, or one occurs twice."""


class BadShare(ProtocolError):
    """A sealed share does not open, or a share is no element of the field."""


class WrongRebuiltKey(ProtocolError):
    """A rebuilt secret does not fit what its owner advertised: some share of it was wrong."""


class ModelMismatch(ProtocolError):
    """Members of an attempt have different models, members or configurations."""


class InvalidSurvivors(ProtocolError):
    """Survivors and dropped are not disjoint, not the members, or not possible for this client."""


class Equivocation(ProtocolError):
    """The server told members different survivors."""


class SecondUpdate(ProtocolError):
    """A client was about to send a second, different update for one round."""


class RetryForbidden(ProtocolError):
    """A round on a sparse graph cannot be tried again once a vector was sent."""


class TooFewClients(ProtocolError):
    """Fewer clients than a threshold asks for; nothing was revealed."""


class TooFewSignatures(ProtocolError):
    """Fewer signatures on the survivors than the threshold asks for; nothing was revealed."""


class SecretsLost(ProtocolError):
    """The secrets of an attempt were lost in a crash, or burned after one."""


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
