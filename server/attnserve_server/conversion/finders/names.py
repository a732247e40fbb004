"""Name sites by the module they belong to: readable, the same in every export, unique in their model.

A site is a place in a graph that computes attention; one whose module is not known is named by its position.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence

import onnx_ir as ir

WRAPPER = "attnserve_source"
"""The attribute under which export wraps the source module; names of sites leave it out."""
NAME_SCOPES = "pkg.torch.onnx.name_scopes"
"""The metadata in which torch's exporter stores the path of modules of a node."""
_INNER = {"self", "attn_fn", "sdpa", "core_attention", "softmax", "attend"}
"""Modules inside the attention module that hold only its computation, or its softmax."""


def site_names(nodes: Sequence[ir.Node]) -> list[str]:
    """Return a name for each node: the path of its module where the exporter stored one, else `attention_<position>`.

    Further nodes with the same path get the suffixes `_1`, `_2`, in order. Metadata that cannot be read counts as none.
    """
    names: list[str] = []
    for position, node in enumerate(nodes):
        base = _module_path(node) or f"attention_{position}"
        name, twin = base, 0
        while name in names:
            twin += 1
            name = f"{base}_{twin}"
        names.append(name)
    return names


def _module_path(node: ir.Node) -> str:
    """Return the dotted path of a node's module; empty where it is not known."""
    parts = _scopes(node) or _slashes(node)
    if parts and parts[0] == WRAPPER:
        parts = parts[1:]
    while parts and re.sub(r"_\d+$", "", parts[-1]) in _INNER:
        parts = parts[:-1]
    return ".".join(re.sub(r"[^A-Za-z0-9_-]", "_", part) for part in parts)


def _scopes(node: ir.Node) -> list[str]:
    """Read the metadata of torch's dynamo exporter: the last scope is the operation, the one before it its module."""
    try:
        scopes = ast.literal_eval(node.metadata_props.get(NAME_SCOPES, "[]"))
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):  # all that `literal_eval` raises
        return []
    if not isinstance(scopes, list) or len(scopes) < 2 or not isinstance(scopes[-2], str):
        return []
    return [part for part in scopes[-2].split(".") if part]


def _slashes(node: ir.Node) -> list[str]:
    """Read a node name such as `/encoder/layer.0/attention/Attention`, which torch's older exporter writes."""
    path, slash, _ = (node.name or "").rpartition("/")
    return [part for step in path.split("/") for part in step.split(".") if part] if slash else []
