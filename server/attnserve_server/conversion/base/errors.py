"""The one error of this room: a model that cannot be brought, said in one sentence."""

from __future__ import annotations

from attnserve_server.domain.errors import AttnserveError


class BuildRefused(AttnserveError):
    """The source, or what was asked of it, cannot become a bundle. The message is one sentence for the person."""

    reason = "BUILD_REFUSED"


class CheckFailed(BuildRefused):
    """The bundle would not do what its source does; nothing was written."""

    reason = "CHECK_FAILED"
