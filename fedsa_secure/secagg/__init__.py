"""Secure aggregation: the server learns sums over clients and nothing of one. docs/protocol.md."""

from fedsa_secure.secagg.client_session import ClientSession, Journal, SessionState, Update
from fedsa_secure.secagg.fixed_point import FixedPoint, integer_cap, rounding_key
from fedsa_secure.secagg.identity import Identity, load_roster, register
from fedsa_secure.secagg.journal import FileJournal, open_session
from fedsa_secure.secagg.masks import Mask, apply_masks
from fedsa_secure.secagg.server_session import ServerSession
from fedsa_secure.secagg.states import Party
from fedsa_secure.secagg.terms import Terms, Thresholds

__all__ = [
    "ClientSession",
    "FileJournal",
    "FixedPoint",
    "Identity",
    "Journal",
    "Mask",
    "Party",
    "ServerSession",
    "SessionState",
    "Terms",
    "Thresholds",
    "Update",
    "apply_masks",
    "integer_cap",
    "load_roster",
    "open_session",
    "register",
    "rounding_key",
]
