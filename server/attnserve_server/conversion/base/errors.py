"""The errors of conversion. A model that cannot be converted raises one, with a message of one sentence."""

from __future__ import annotations

from attnserve_server.domain.errors import AttnserveError


class BuildRefused(AttnserveError):
    """The source, or the request, cannot become a bundle. The message is one sentence for the user."""

    reason = "BUILD_REFUSED"


class CheckFailed(BuildRefused):
    """The converted graph does not answer as its source does; no bundle was written."""

    reason = "CHECK_FAILED"
