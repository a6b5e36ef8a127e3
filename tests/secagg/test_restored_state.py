"""A state comes back from the disk as it was, and a damaged one is refused."""

from pathlib import Path

import pytest
from secagg_attackers import Federation

from fedsa_secure.errors import SecretsLost
from fedsa_secure.secagg import Party, open_session
from fedsa_secure.secagg.wire import Delivery


def test_a_client_that_restarts_after_every_message_is_no_different(tmp_path: Path) -> None:
    federation = Federation(4).opened()
    party = Party(federation.terms, 0, federation.identities[0])

    def restart() -> None:
        federation.clients[0].close()
        federation.clients[0] = open_session(party, lambda _: federation.cohort, tmp_path / "0")

    restart()
    federation.opened()
    messages = federation.begin()
    while messages:
        restart()
        answer = bytes(federation.tell(0, messages[0]))
        restart()
        assert bytes(federation.tell(0, messages[0])) == answer
        federation.send(messages)
        messages = federation.close()
    assert federation.server.total.tolist() == federation.sum_of(range(4)).tolist()
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "0").iterdir()}
    assert modes == {0o600}


def test_a_damaged_state_is_refused_and_kept(tmp_path: Path) -> None:
    federation = Federation(4).opened()
    party = Party(federation.terms, 0, federation.identities[0])
    federation.clients[0] = open_session(party, lambda _: federation.cohort, tmp_path)
    federation.opened().until(Delivery)
    path = tmp_path / "state.bin"
    damaged = path.read_bytes()[:-5]
    path.write_bytes(damaged)
    federation.clients[0].close()
    with pytest.raises(SecretsLost, match="damaged"):
        open_session(party, lambda _: federation.cohort, tmp_path)
    assert path.read_bytes() == damaged
