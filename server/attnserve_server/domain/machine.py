"""What the machine gives this process, cores and memory, what it takes back, and addresses that only it reaches."""

from __future__ import annotations

import ctypes
import ipaddress
import math
import os
from pathlib import Path
from typing import Final

_CPU_QUOTA: Final = Path("/sys/fs/cgroup/cpu.max")
_MEMORY_LIMIT: Final = Path("/sys/fs/cgroup/memory.max")
_STATM: Final = Path("/proc/self/statm")
_LEAST_CORES: Final = 4
"""Cores from which a server is several processes unasked. On two, one process answered more: docs/adr/0008."""


def cores(quota: Path = _CPU_QUOTA) -> int:
    """Return the number of cores that this process may use: those of its affinity, at most its quota, rounded up.

    Args:
        quota: the file with the quota of the control group: microseconds of processor time, or `max`, and the period
            (Linux, Documentation/admin-guide/cgroup-v2.rst, cpu.max); without that file, there is no quota.
    """
    found = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        limit, period = quota.read_text(encoding="ascii").split()
        return min(found, max(1, math.ceil(int(limit) / int(period))))
    except (OSError, ValueError):  # no control group, or `max`
        return found


def suits_processes() -> bool:
    """Return whether a server of several processes is possible here, and has the cores to answer more than one."""
    return hasattr(os, "memfd_create") and cores() >= _LEAST_CORES


def memory_bytes(limit: Path = _MEMORY_LIMIT) -> int:
    """Return the bytes of memory that this process may use: the machine's, at most its control group's limit.

    Args:
        limit: the file with the limit of the control group, bytes or `max` (Linux, cgroup-v2.rst, memory.max).
    """
    found = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        return min(found, int(limit.read_text(encoding="ascii")))
    except (OSError, ValueError):  # no control group, or `max`
        return found


def is_loopback(host: str) -> bool:
    """Return whether only this machine reaches a server on `host`: an address, or a name, of which `localhost` is one.

    Source: RFC 6761, section 6.3: `localhost` always is the loopback address.
    """
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def resident_bytes(statm: Path = _STATM) -> int:
    """Return the process's resident memory in bytes; 0 if the system does not report it."""
    return sum(_resident(statm))


def anonymous_bytes(statm: Path = _STATM) -> int:
    """Return the part of the resident memory that is of no file and not shared; 0 if the system does not report it."""
    return _resident(statm)[0]


def _resident(statm: Path) -> tuple[int, int]:
    """Return the resident bytes of no file, and the others. Source: Linux, filesystems/proc.rst, statm."""
    try:
        _, resident, shared, *_ = map(int, statm.read_text(encoding="ascii").split())
    except OSError:
        return 0, 0
    page = os.sysconf("SC_PAGE_SIZE")
    return (resident - shared) * page, shared * page


def return_freed_memory() -> None:
    """Return memory that the C library's allocator keeps to the system, where that can (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
