"""What a method is: which roles are trained and which of those are shared."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from fedsa_secure.errors import ConfigError
from fedsa_secure.types import Role


@dataclass(frozen=True, kw_only=True)
class Method:
    """One row: trained ⊇ shared. What is neither stays at its public, seeded start.

    Args:
        name: as the user types it.
        trained: roles with a gradient at the client.
        shared: roles whose update leaves the client and whose average comes back.
        summary: one line for tables.
        source: paper and section.

    Raises:
        ConfigError: if something is shared that is not trained, or nothing is trained.
    """

    name: str
    trained: frozenset[Role]
    shared: frozenset[Role]
    summary: str
    source: str

    def __post_init__(self) -> None:
        if not self.trained:
            raise ConfigError("method", f"{self.name} would train nothing")
        extra = self.shared - self.trained
        if extra:
            raise ConfigError(
                "method", f"{self.name} would share {_listed(extra)} without training it"
            )

    @property
    def personal(self) -> frozenset[Role]:
        """Roles that are trained and never leave the client."""
        return self.trained - self.shared

    def with_head(self, head: Literal["local", "frozen", "shared"]) -> "Method":
        """The same method with another treatment of the task head.

        Raises:
            ConfigError: if a method that shares nothing is asked to share its head.
        """
        if head == "frozen":
            return replace(
                self, trained=self.trained - {Role.HEAD}, shared=self.shared - {Role.HEAD}
            )
        if head == "shared":
            if not self.shared:
                raise ConfigError(
                    "head",
                    f"method {self.name!r} shares nothing, so it cannot share the head",
                    "use head='local' or head='frozen'",
                )
            return replace(self, shared=self.shared | {Role.HEAD})
        return self


def _listed(roles: Iterable[Role]) -> str:
    return ", ".join(sorted(role.value for role in roles))
