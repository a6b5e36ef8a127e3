"""``mask``: a round through the protocol, all clients of a simulation in one process.

Every client has a session and keys of its own, the server has one, and nothing but encoded messages
passes between them. docs/protocol.md.
"""

import hashlib
import importlib.metadata
import logging
import struct
from collections.abc import Callable, Iterator, Sequence

from fedsa_secure.config import TrainConfig
from fedsa_secure.errors import ConfigError, ProtocolError
from fedsa_secure.federation.aggregation import Contribute, Contribution, Outcome
from fedsa_secure.federation.dropouts import Dropouts, Step
from fedsa_secure.federation.encoding import Layout
from fedsa_secure.federation.local_training import optimizer_settings
from fedsa_secure.federation.masked_vector import MaskedVector
from fedsa_secure.federation.run_folder import config_digest
from fedsa_secure.federation.server import select_clients
from fedsa_secure.federation.update_range import update_range
from fedsa_secure.methods import Method
from fedsa_secure.secagg import (
    ClientSession,
    Identity,
    Party,
    ServerSession,
    Terms,
    Thresholds,
    Update,
    integer_cap,
)
from fedsa_secure.secagg.derivation import digest
from fedsa_secure.secagg.server_session import Exchange
from fedsa_secure.secagg.wire import (
    Advertised,
    Agreements,
    Delivery,
    Invite,
    ServerStep,
    Survivors,
    decode_server,
)
from fedsa_secure.types import NamedTensors

_log = logging.getLogger(__name__)

_OWN = frozenset(
    {
        "clients_per_pass",
        "client_state",
        "device",
        "dp_home",
        "dp_dataset_id",
        "dp_lifetime_epsilon",
    }
)
"""Options that are a client's own affair, and may follow from its data (``clients_per_pass``)."""

_IN_TERMS = frozenset({"mask_generator"})
"""Options that the protocol's terms hold by name, so that a client with another one is told so."""

_STEPS: dict[type, Step] = {
    Invite: Step.ADVERTISE_KEYS,
    Advertised: Step.SHARE_KEYS,
    Delivery: Step.MASKED_INPUT,
    Survivors: Step.CONSISTENCY,
    Agreements: Step.UNMASK,
}


def thresholds_of(config: TrainConfig, clients_in_round: int) -> Thresholds:
    """The floors that a run's options ask for.

    Raises:
        ConfigError: if they cannot protect anyone, or can never be reached.
    """
    return Thresholds.of(
        clients_in_round,
        config.colluders,
        config.threshold,
        config.min_survivors,
        config.rounds,
    )


def round_thresholds(config: TrainConfig) -> Thresholds:
    """The floors of a round of a resolved configuration."""
    cohort = select_clients(config.clients or 0, config.participation, config.seed, 1)
    return thresholds_of(config, len(cohort))


def check_options(config: TrainConfig, method: Method) -> None:
    """Refuse what the protocol could not do, before a run begins.

    Args:
        config: the resolved configuration.
        method: what is shared; where nothing is, there is no protocol.

    Raises:
        ConfigError: naming the option.
    """
    clients = config.clients or 0
    dropouts = Dropouts.of(config, clients)
    if not method.shared:
        if dropouts.possible:
            raise ConfigError(
                "dropouts", f"with method {method.name!r} nothing is sent", "leave the option out"
            )
        return
    in_round = round_thresholds(config).clients
    if config.weight_cap is not None and config.weight_cap > integer_cap(in_round):
        raise ConfigError(
            "weight_cap",
            f"{in_round} weights of {config.weight_cap} do not fit into 32 bits",
            f"give at most {integer_cap(in_round)}",
        )
    rates = [max(config.learning_rate, config.head_learning_rate or 0.0)] * config.local_steps
    update_range(config, optimizer_settings(config), rates, largest=0.0)


class SecureAggregation:
    """Rounds through the protocol, with whatever clients the configuration lets fail.

    Args:
        config: the resolved configuration.
        layout: of the shared tensors.
        cohort_of: the clients of a round, in order.
        update_range: of a round, from its number and the public tensors at its start.

    Guarantee: that of ``ClientSession``, for the object that plays the server. The process that
    simulates everybody sees everything.
    """

    def __init__(
        self,
        config: TrainConfig,
        layout: Layout,
        cohort_of: Callable[[int], list[int]],
        update_range: Callable[[int, NamedTensors], float],
    ) -> None:
        thresholds = thresholds_of(config, len(cohort_of(1)))
        self._range, self._attempts = update_range, config.max_attempts
        self._seed = config.seed
        self._dropouts = Dropouts.of(config, config.clients or 0)
        self._vector = MaskedVector(
            layout.size,
            thresholds.clients,
            config.seed,
            config.weight_cap,
            private=config.dp_epsilon is not None,
            metric=config.dp_metrics is not None,
        )
        identities = {
            client: Identity.from_secret(digest("simulated identity", config.seed, client))
            for client in range(config.clients or 0)
        }
        self._terms = Terms(
            roster={client: each.public_key for client, each in identities.items()},
            thresholds=thresholds,
            size=self._vector.size,
            application=_application(config, layout),
            consistency=config.threat == "malicious",
            rounds=config.rounds,
            mask_generator=config.mask_generator,
        )
        self._clients = {
            client: ClientSession(Party(self._terms, client, identity), cohort_of, resend=False)
            for client, identity in identities.items()
        }
        self.server = ServerSession(self._terms)

    def uplink_bytes(self, values: int) -> int:
        """Of a masked vector: four bytes per value, loss, clipped values and weight included."""
        return 4 * self._vector.size if values else 0

    def round(
        self,
        number: int,
        cohort: Sequence[int],
        next_cohort: Sequence[int] | None,
        shared: NamedTensors,
        contribute: Contribute,
    ) -> Outcome:
        """Aggregate one round (see ``Aggregation``); it is lost if every attempt is aborted."""
        going = _Round(number, self._range(number, shared), contribute, self._dropouts.possible)
        model = public_values_hash(shared, going.bound)
        if not self.server.sid:
            self._open_session()
        retry = True
        while retry and going.attempts < self._attempts:
            # Setup on the way is for rounds that follow one without an abort.
            ahead = None if going.attempts else next_cohort
            exchange = self.server.begin(number, cohort, model, ahead)
            going.attempts += 1
            if self.server.setup_error is not None:
                going.abort(self.server.setup_error)
                if going.attempts == self._attempts:
                    break
                going.attempts += 1
            try:
                survivors = self._exchanges(going, exchange, model)
            except ProtocolError as error:
                going.abort(error)
                retry = self.server.may_retry
                continue
            return self._outcome(going, survivors)
        return going.lost()

    def _open_session(self) -> None:
        """A session id from nonces of all clients (docs/protocol.md §7).

        They follow from the seed, as the identities do: on a sparse graph both decide who is whose
        neighbour, and so which failures a round survives, and a resumed run has to end like one
        that was not interrupted. Keys and masks are fresh.
        """
        for number, client in self._clients.items():
            nonce = digest("simulated nonce", self._seed, number)
            self.server.receive(client.commit(nonce))
        for _ in range(2):
            for number, messages in self.server.close().items():
                for message in messages:
                    answer = self._clients[number].receive(message)
                    if answer is not None:
                        self.server.receive(answer)

    def _exchanges(self, going: "_Round", exchange: Exchange, model: bytes) -> tuple[int, ...]:
        """Exchange messages until the sum is there; returns the survivors."""
        survivors: tuple[int, ...] = ()
        while exchange:
            going.exchanges += 1
            pending = {client: list(messages) for client, messages in exchange.items()}
            if self.server.members:
                self._collect_vectors(going, pending, model)
            for client, messages in pending.items():
                for message in messages:
                    self._pass_on(going, client, message, None)
            exchange = self.server.close()
            survivors = self.server.survivors or survivors
        return survivors

    def _collect_vectors(
        self, going: "_Round", pending: dict[int, list[bytes]], model: bytes
    ) -> None:
        """Let the members train that do not drop out, and send what comes of it one by one."""
        members = [c for c in self.server.members if self._answers(going, c, pending[c][0])]
        for each in going.contributions(members):

            def fill(out, each=each) -> None:  # type: ignore[no-untyped-def]
                self._vector.write(each, going.number, going.bound, out)

            self._pass_on(going, each.client, pending[each.client][0], Update(model, fill))
        for client in self.server.members:
            del pending[client][0]

    def _pass_on(self, going: "_Round", client: int, message: bytes, update: Update | None) -> None:
        """One message to a client, and its answer to the server."""
        if not self._answers(going, client, message):
            return
        try:
            answer = self._clients[client].receive(message, update)
            if answer is None:
                return
            going.overhead_bytes += len(answer) - (4 * self._terms.size if update else 0)
            self.server.receive(answer)
        except ProtocolError as error:
            _log.warning("round %d, client %d: %s", going.number, client, error)

    def _answers(self, going: "_Round", client: int, message: bytes) -> bool:
        """Whether the simulation lets this client answer."""
        decoded = decode_server(message, self._terms)
        assert isinstance(decoded, ServerStep)  # noqa: S101 - for mypy; sessions check it
        # Keys of the next round that travel with this one are its first attempt.
        attempt = going.attempts if decoded.round == going.number else 1
        at = self._dropouts.step(decoded.round, attempt, client)
        step = _STEPS[type(decoded)]
        if step is Step.CONSISTENCY and not self._terms.consistency:
            step = Step.UNMASK  # what answers it then (docs/protocol.md §8)
        return at is None or step < at

    def _outcome(self, going: "_Round", survivors: tuple[int, ...]) -> Outcome:
        total = self.server.total
        if total is None:
            raise RuntimeError("the exchanges ended without a sum")
        opened = self._vector.open(total, len(survivors), going.bound)
        if opened.clipped:
            _log.warning(
                "round %d: %d values were beyond update_range=%g and were clipped; give a larger "
                "one, or leave it out",
                going.number,
                opened.clipped,
                going.bound,
            )
        return Outcome(
            mean=opened.mean,
            loss=opened.loss,
            survivors=survivors,
            clipped=opened.clipped,
            accuracy=opened.accuracy,
            attempts=going.attempts,
            aborts=tuple(going.aborts),
            exchanges=going.exchanges,
            overhead_bytes=going.overhead_bytes,
        )


class _Round:
    """What accumulates while a round is tried.

    Args:
        number: counted from 1.
        bound: range of its updates.
        contribute: lets clients train.
        keep: whether contributions are kept for another attempt.
    """

    def __init__(self, number: int, bound: float, contribute: Contribute, keep: bool) -> None:
        self.number, self.bound = number, bound
        self._contribute, self._keep = contribute, keep
        self._kept: dict[int, Contribution] = {}
        self.attempts = self.exchanges = self.overhead_bytes = 0
        self.aborts: list[str] = []

    def contributions(self, clients: Sequence[int]) -> Iterator[Contribution]:
        """Of these clients; nobody trains twice in a round."""
        yield from (self._kept[client] for client in clients if client in self._kept)
        for each in self._contribute([c for c in clients if c not in self._kept]):
            if self._keep:
                self._kept[each.client] = each
            yield each

    def abort(self, error: ProtocolError) -> None:
        """Note why an attempt ended."""
        self.aborts.append(f"{type(error).__name__}: {error}")
        _log.warning("round %d, attempt %d: %s", self.number, self.attempts, self.aborts[-1])

    def lost(self) -> Outcome:
        """Nothing came of the round."""
        return Outcome(
            mean=None,
            loss=None,
            survivors=(),
            attempts=self.attempts,
            aborts=tuple(self.aborts),
            exchanges=self.exchanges,
            overhead_bytes=self.overhead_bytes,
        )


def public_values_hash(shared: NamedTensors, bound: float) -> bytes:
    """What all members of a round have to agree on besides the configuration.

    Every client computes it from the tensors that it was given, so members with different models
    have masks that do not cancel (docs/protocol.md §3).
    """
    hashed = hashlib.sha256()
    for tensor in shared.values():
        hashed.update(tensor.contiguous().numpy().data)
    return digest("model", hashed.digest(), struct.pack("<d", bound))


def _application(config: TrainConfig, layout: Layout) -> bytes:
    """Everything but the protocol's own terms that has to be equal for all clients."""
    names = [f"{name}{list(shape)}" for name, shape in layout.shapes.items()]
    version = importlib.metadata.version("fedsa-secure")  # defaults may differ between versions
    parts = (version, config_digest(config, _OWN | _IN_TERMS), "\n".join(names))
    return digest("application", *(part.encode() for part in parts))
