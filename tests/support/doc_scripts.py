"""Scripts of docs/ that tests import: they are no package."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

FOLDER = Path(__file__).parents[2] / "docs"


def script(name: str) -> ModuleType:
    """Return a module of docs/, imported once. Raises ImportError for a name that is no file there."""
    known = f"docs_{name}"
    if known not in sys.modules:
        spec = importlib.util.spec_from_file_location(known, FOLDER / f"{name}.py")
        if spec is None or spec.loader is None or not (FOLDER / f"{name}.py").is_file():
            raise ImportError(f"docs/{name}.py does not exist")
        sys.modules[known] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[known])
    return sys.modules[known]


blocks = script("blocks")
