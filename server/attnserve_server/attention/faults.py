"""What is wrong with a selection, gathered so that it can be told all at once."""

from __future__ import annotations

from attnserve_server.domain.errors import FieldViolation, InvalidRequest

MAX_FAULTS = 16
"""So that a request of a million wrong indices costs, and answers, no more than one of a few."""


class Faults:
    """The first fault of each field, up to a bound."""

    def __init__(self) -> None:
        self._found: dict[str, FieldViolation] = {}

    def __bool__(self) -> bool:
        return bool(self._found)

    @property
    def full(self) -> bool:
        """Whether there is no room for more, so that looking further is no use."""
        return len(self._found) >= MAX_FAULTS

    def add(self, field: str, description: str) -> None:
        """Note that `field` is at fault, unless that is known already."""
        if not self.full:
            self._found.setdefault(field, FieldViolation(field, description))

    def raise_any(self) -> None:
        """Raise InvalidRequest with all of them, if there are any."""
        if self._found:
            raise InvalidRequest(*self._found.values())
