"""Read the external data of an ONNX file, from the file's own folder or the cache that the file is linked into.

`read_external_data` raises BuildRefused where data is missing, cut short, or elsewhere.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath

import onnx
from onnx.external_data_helper import load_external_data_for_tensor, uses_external_data

from attnserve_server.conversion.base.errors import BuildRefused
from attnserve_server.conversion.graphs.operators import subgraphs_of

MAX_GRAPH_BYTES = 2**31 - 1
"""The limit of one protobuf message."""


def read_external_data(proto: onnx.ModelProto, path: Path) -> None:
    """Read a model's external data into it.

    Data that is a link is read if its target is in the model's folder, in the folder of the model's own target, or
    in the hub cache that holds the model.

    Args:
        proto: parsed from the file.
        path: of the file, which may be a link.

    Raises:
        BuildRefused: data is missing, cut short, elsewhere, or exceeds 2 GiB with the graph.
    """
    name = path.name
    total = proto.ByteSize()
    found: list[tuple[onnx.TensorProto, Path]] = []
    for tensor in _external_tensors(proto):
        facts = {entry.key: entry.value for entry in tensor.external_data}
        data = _followed(path.parent / _inside(facts.get("location", ""), name), path)
        length = facts.get("length", "")
        total += int(length) if length.isdecimal() and len(length) < 20 else data.stat().st_size
        if total > MAX_GRAPH_BYTES:
            raise too_large(name, total)
        found.append((tensor, data))
    try:
        for tensor, data in found:
            next(entry for entry in tensor.external_data if entry.key == "location").value = data.name
            load_external_data_for_tensor(tensor, str(data.parent))
            tensor.data_location = onnx.TensorProto.DEFAULT
            del tensor.external_data[:]
    except Exception:  # noqa: BLE001 - the boundary to onnx, which raises many types here
        raise BuildRefused(f"{name}: its external data is missing, cut short, or outside the model's folder") from None


def too_large(name: str, size: int) -> BuildRefused:
    """Return the refusal of a file of this size, in bytes with its external data."""
    return BuildRefused(
        f"{name} has {size} bytes with its external data; the limit of an ONNX file is {MAX_GRAPH_BYTES}"
    )


def _followed(data: Path, model: Path) -> Path:
    """Return the regular file that holds the data, with all links followed.

    Raises:
        BuildRefused: there is none, or it is outside the model's folder and cache.
    """
    name = model.name
    try:
        target = data.resolve(strict=True)
        status = target.stat()
    except (OSError, ValueError):
        raise BuildRefused(f"{name}: its external data {data.name!r} is missing") from None
    roots = (model.parent.resolve(), *_caches(model))
    # A file outside may be any file of the machine. One with several names may be changed from outside.
    if stat.S_ISREG(status.st_mode) and status.st_nlink == 1 and any(map(target.is_relative_to, roots)):
        return target
    raise BuildRefused(
        f"{name}: its external data {data.name!r} is a link out of the model's folder and cache, or no regular file; "
        "copy the data itself beside the model, as `cp -L` does"
    )


def _caches(model: Path) -> Iterator[Path]:
    """Yield the folders whose files a model's data may link to.

    They are the folder of the model's own target, and the root of a hub cache that the model is in. Source: the layout
    of huggingface_hub's cache, `<root>/snapshots/<revision>/...` with links to `<root>/blobs/<digest>`.
    """
    if model.is_symlink():
        yield model.resolve().parent
    for folder in model.absolute().parents:
        if folder.name == "snapshots" and (folder.parent / "blobs").is_dir():
            yield (folder.parent / "blobs").resolve()


def _inside(location: str, name: str) -> str:
    """Return a location if it cannot leave the model's folder: it has no drive, no root and no `..`.

    Raises:
        BuildRefused: it is empty or can leave the folder.
    """
    for path in (PurePosixPath(location), PureWindowsPath(location)):
        if not location or path.drive or path.root or ".." in path.parts:
            # Of an absolute location, the message has the last part only, because messages hold no path of a machine.
            shown = path.name if path.drive or path.root else location
            raise BuildRefused(
                f"{name}: the location {shown!r} of its external data is outside the model's folder; "
                "copy the data beside the model, and set the location to the name of the copy"
            )
    return location


def _external_tensors(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Yield all tensors with external data, those of constants and subgraphs included."""
    graphs: list[onnx.GraphProto] = [proto.graph]
    nodes: list[onnx.NodeProto] = [node for function in proto.functions for node in function.node]
    while graphs or nodes:
        if graphs:
            graph = graphs.pop()
            yield from (tensor for tensor in graph.initializer if uses_external_data(tensor))
            nodes.extend(graph.node)
            continue
        node = nodes.pop()
        for attribute in node.attribute:
            yield from (tensor for tensor in (attribute.t, *attribute.tensors) if uses_external_data(tensor))
        graphs.extend(subgraphs_of(node))
