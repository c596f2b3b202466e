"""Where the engine's library for CUDA and the libraries that it opens are looked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainer import engine_path
from trainer.engine_path import cuda_environment, cuda_folders, cuda_library


@pytest.fixture
def bins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installation without a library, in a tree where none was built."""
    for name in ("HOTSTAGE_CUDA", "HOTSTAGE_CUDA_LIBRARIES"):
        monkeypatch.delenv(name, raising=False)
    site = tmp_path / "site"
    monkeypatch.setattr(engine_path.sysconfig, "get_path", lambda _: str(site))
    monkeypatch.setattr(engine_path, "__file__", str(tmp_path / "tree" / "trainer" / "engine_path.py"))
    return site / "trainer" / "bin"


def touched(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


def test_a_library_is_named_installed_or_built(bins: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cuda_library() is None
    assert cuda_environment() == {}
    built = touched(tmp_path / "tree" / "out" / "cuda" / "libhs_cuda.so")
    assert cuda_library() == built
    installed = touched(bins / "libhs_cuda.so")
    assert cuda_library() == installed
    monkeypatch.setenv("HOTSTAGE_CUDA", "/nowhere/libhs_cuda.so")  # not there: the engine says that of this one
    assert cuda_environment() == {"HOTSTAGE_CUDA": "/nowhere/libhs_cuda.so"}


def test_folders_of_the_wheels(bins: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cu13 = touched(bins.parent.parent / "nvidia" / "cu13" / "lib" / "libcublasLt.so.13").parent
    nccl = touched(bins.parent.parent / "nvidia" / "nccl" / "lib" / "libnccl.so.2").parent
    assert cuda_folders() == [cu13, nccl]
    own = touched(tmp_path / "own" / "x").parent
    monkeypatch.setenv("HOTSTAGE_CUDA_LIBRARIES", f"{own}:/nowhere::{own}")
    assert cuda_folders() == [own, cu13, nccl]
    touched(bins / "libhs_cuda.so")
    monkeypatch.setenv("LD_LIBRARY_PATH", "/mine")
    told = cuda_environment()
    assert told["HOTSTAGE_CUDA_LIBRARIES"] == f"{own}:{cu13}:{nccl}"
    assert told["LD_LIBRARY_PATH"] == f"{own}:{cu13}:{nccl}:/mine"
