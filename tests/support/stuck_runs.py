"""A failpoint for server processes: while a file exists, each run waits in native code, where nothing can stop it.

The processes of a server import `sitecustomize` from a folder in PYTHONPATH. No code of the server knows of it.
"""

from __future__ import annotations

import os
from pathlib import Path

_CODE = """
import os, sys
if {process!r} in " ".join(sys.orig_argv):
    import ctypes
    from attnserve_server.engine import session
    usual = session.RuntimeSession.run

    def run(self, *arguments, **options):
        while os.path.exists({trigger!r}):
            ctypes.CDLL(None).usleep({microseconds})  # without the interpreter's lock, as a kernel of the runtime
            if {once!r}:
                break
        return usual(self, *arguments, **options)

    session.RuntimeSession.run = run
"""


def environment(
    folder: Path, trigger: Path, *, process: str, seconds: float = 600.0, once: bool = False
) -> dict[str, str]:
    """Return the environment of a server whose runs wait while `trigger` exists.

    Args:
        folder: for the module.
        trigger: the file.
        process: text in the command line of the processes that run models.
        seconds: of one native wait, which ends before the file is looked for again.
        once: each run waits once, and then runs.
    """
    folder.mkdir(exist_ok=True)
    code = _CODE.format(process=process, trigger=str(trigger), microseconds=round(seconds * 1e6), once=once)
    (folder / "sitecustomize.py").write_text(code)
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])}
