"""Who asks, and what they may do. Knows neither HTTP nor where tokens are kept."""

import fnmatch
from dataclasses import dataclass
from typing import Literal

from loractl.adapters.errors import NotAllowed

Right = Literal["read", "write", "promote", "admin"]

_IMPLIED: dict[str, frozenset[str]] = {
    "read": frozenset({"read", "write", "promote", "admin"}),
    "write": frozenset({"write", "admin"}),
    "promote": frozenset({"promote", "admin"}),
    "admin": frozenset({"admin"}),
}


@dataclass(frozen=True, slots=True)
class Actor:
    """A token's holder during one request; `token_id` is None for somebody without a token."""

    token_id: str | None
    name: str
    roles: frozenset[str]
    pattern: str
    request_id: str = ""

    @property
    def is_anonymous(self) -> bool:
        return self.token_id is None

    @property
    def is_hub_admin(self) -> bool:
        return "admin" in self.roles and self.pattern == "*"

    def covers(self, repo_id: str) -> bool:
        """Tell whether the token's pattern names this repo; names that differ in case are one name."""
        return fnmatch.fnmatchcase(repo_id.casefold(), self.pattern.casefold())

    def may(self, right: Right, repo_id: str, *, private: bool) -> bool:
        """Tell whether this right reaches the repo: every reader reads public repos, all else needs the pattern."""
        if not self.roles & _IMPLIED[right]:
            return False
        return (right == "read" and not private) or self.covers(repo_id)

    def require(self, right: Right, repo_id: str, *, private: bool) -> None:
        """Raise NotAllowed unless `may`; only for repos whose existence this actor may know."""
        if not self.may(right, repo_id, private=private):
            raise NotAllowed(
                f"this token may not {right if right != 'admin' else 'administer'} {repo_id}",
                hint=f"ask for a token with the role {right} and a pattern that covers {repo_id}",
            )


SYSTEM = Actor(token_id="system", name="system", roles=frozenset({"admin"}), pattern="*")  # noqa: S106
"""The hub itself: its commands on its own machine."""


def anonymous(*, may_read: bool, request_id: str = "") -> Actor:
    """Somebody without a token."""
    roles = frozenset({"read"}) if may_read else frozenset[str]()
    # A pattern that covers no repo: without a token only public repos exist.
    return Actor(None, "anonymous", roles, "", request_id)
