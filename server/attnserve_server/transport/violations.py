"""What is wrong with one request, gathered so that all of it is told at once. The checks themselves are elsewhere."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from attnserve_server.domain.errors import FieldViolation, InvalidRequest

MAX_VIOLATIONS: Final = 16
"""Most faults that are told of one request: enough to mend it by, and few enough for a trailer."""
_MAX_SHOWN: Final = 64


class Violations:
    """What is wrong with one request, all told at once; at most 16, so that a bad request costs little."""

    def __init__(self) -> None:
        self._found: list[FieldViolation] = []

    def __len__(self) -> int:
        return len(self._found)

    @property
    def full(self) -> bool:
        """Whether there is no room for more, so that looking further is no use."""
        return len(self._found) >= MAX_VIOLATIONS

    def add(self, field: str, description: str) -> None:
        """Notes that `field` is at fault."""
        if not self.full:
            self._found.append(FieldViolation(field, description))

    def extend(self, violations: Iterable[FieldViolation]) -> None:
        """Notes all of these, as far as there is room."""
        for violation in violations:
            self.add(violation.field, violation.description)

    def raise_any(self) -> None:
        """Raises InvalidRequest if anything is wrong."""
        if self._found:
            raise InvalidRequest(*self._found)


def shown(text: str) -> str:
    """A caller's text as it may stand in a message: quoted, escaped, cut to 64 characters."""
    return ascii(text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + "...")
