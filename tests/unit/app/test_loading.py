"""A bundle is opened as its manifest says, for every device alike."""

from __future__ import annotations

from pathlib import Path

import pytest
from attnserve_server.config import Settings
from attnserve_server.engine.session import RuntimeSession
from attnserve_server.loading import open_bundle
from attnserve_server.model.repository import write_bundle
from tiny_bundle import tiny_manifest, write_tiny_files


@pytest.mark.parametrize("left_out", [None, (), ("MatMulAddFusion",)])
def test_rewritings_that_a_bundle_leaves_out_are_left_out_when_it_is_served(
    left_out: tuple[str, ...] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[object] = []
    load = RuntimeSession.load

    def recording(path: Path, **options: object) -> RuntimeSession:
        told.append(options["left_out"])
        return load(path, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(RuntimeSession, "load", recording)
    manifest = tiny_manifest().model_copy(update={"left_out": left_out})
    bundle = write_bundle(tmp_path / "models", manifest, write_tiny_files(tmp_path))
    open_bundle(bundle, Settings(repository=tmp_path / "models"))
    assert told == [left_out]
