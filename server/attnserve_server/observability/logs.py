"""Logs: one JSON line for each event, on standard error."""

from __future__ import annotations

import logging
import sys
from typing import Final, TextIO

import structlog

_LEVELS: Final = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}

Logger = structlog.stdlib.BoundLogger


def configure(level: str = "info", stream: TextIO | None = None) -> None:
    """Write the logs of the server and of all libraries to one stream, as JSON lines.

    JSON escapes line ends and control characters, so that text from a caller cannot forge or colour a line.

    Args:
        level: `debug`, `info`, `warning` or `error`.
        stream: where to write; None: standard error.

    Raises:
        KeyError: `level` is none of these.
    """
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared, structlog.stdlib.add_logger_name, structlog.stdlib.ExtraAdder()],
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.format_exc_info,
                structlog.processors.JSONRenderer(),
            ],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(_LEVELS[level])
    # Below warning, these libraries log connections and requests, which metrics count.
    for library in ("uvicorn", "grpc", "asyncio"):
        logging.getLogger(library).setLevel(max(_LEVELS[level], logging.WARNING))
        logging.getLogger(library).handlers[:] = []
        logging.getLogger(library).propagate = True
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.make_filtering_bound_logger(_LEVELS[level]),
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=False,
    )


def logger(name: str) -> Logger:
    """Return the logger of a module."""
    made: Logger = structlog.stdlib.get_logger(name)
    return made
