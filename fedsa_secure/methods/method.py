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
                "method", f"{self.name} would share {listed(extra)} without training it"
            )

    @property
    def personal(self) -> frozenset[Role]:
        """Roles that are trained and never leave the client."""
        return self.trained - self.shared

    @property
    def has_private_adapter(self) -> bool:
        """Whether clients have a second adapter of their own."""
        return Role.PRIVATE_A in self.trained

    def without_head(self) -> "Method":
        """The same method on a model that has no task head.

        Raises:
            ConfigError: if a method trains nothing else.
        """
        if self.trained == {Role.HEAD}:
            raise ConfigError(
                "method",
                f"{self.name!r} trains the head only, and a model that generates has none",
                "choose another method",
            )
        return self.with_head("frozen")

    def without(self, role: Role) -> "Method":
        """The same method with one role left at its public start."""
        return replace(self, trained=self.trained - {role}, shared=self.shared - {role})

    def only(self, roles: Iterable[Role]) -> "Method":
        """A method that trains these roles and shares nothing."""
        return replace(self, trained=frozenset(roles), shared=frozenset())

    def with_head(self, head: Literal["local", "frozen", "shared"]) -> "Method":
        """The same method with another treatment of the task head.

        Raises:
            ConfigError: if a method that shares nothing is asked to share its head.
        """
        if head == "frozen":
            return self.without(Role.HEAD)
        if head == "shared":
            if not self.shared:
                raise ConfigError(
                    "head",
                    f"method {self.name!r} shares nothing, so it cannot share the head",
                    "use head='local' or head='frozen'",
                )
            return replace(self, shared=self.shared | {Role.HEAD})
        return self


def listed(roles: Iterable[Role]) -> str:
    """Roles in the order of ``Role``, for tables and errors."""
    chosen = set(roles)
    return ", ".join(role.value for role in Role if role in chosen)
