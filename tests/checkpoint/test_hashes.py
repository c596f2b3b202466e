"""The engine's digests, as the agent takes them: hashlib's and zlib's, for data of every length and in every memory."""

from __future__ import annotations

import hashlib
import mmap
import random
import subprocess
import sysconfig
import zlib
from itertools import pairwise
from pathlib import Path

import pytest

from checkpoint import hashes
from checkpoint.hashes import crc32, sha256_leaves, sha256_two_chunks
from tests.support.compilers import find
from trainer import wire

LENGTHS = [(), (0,), (1,), (63,), (64,), (65,), (4096,), (4097,), (8191, 1, 64, 0, 5000), (100_000,), (12_288, 12_292)]


def expected(data: bytes, lengths: tuple[int, ...], block: int) -> bytes:
    found, at = b"", 0
    for length in lengths:
        piece = data[at : at + length]
        found += b"".join(hashlib.sha256(piece[n : n + block]).digest() for n in range(0, length, block))
        at += length
    return found


@pytest.mark.parametrize("plain", [False, True], ids=["library", "hashlib"])
def test_they_are_hashlibs(plain: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if plain:
        monkeypatch.setattr(hashes, "_LIBRARY", None)
    elif hashes._LIBRARY is None:
        pytest.skip("the library is not built here")
    rng = random.Random(0)
    drawn = [tuple(rng.choice((0, 4, 60, 64, 4096, rng.randrange(9000))) for _ in range(5)) for _ in range(40)]
    drawn.append(tuple(rng.randrange(20_000) for _ in range(70)))  # lanes get leaf after leaf
    for lengths in [*LENGTHS, *drawn]:
        data = rng.randbytes(sum(lengths))
        for block in (64, 1000, 4096):
            for whole in (False, True):
                found, total = sha256_leaves(data, lengths, block, whole=whole)
                assert found == expected(data, lengths, block)
                assert total == (hashlib.sha256(data).digest() if whole else b"")


@pytest.mark.parametrize("plain", [False, True], ids=["library", "hashlib"])
def test_two_chunks_are_hashlibs(plain: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of equal and of very different sizes, of odd pieces, of few leaves and of more than there are lanes."""
    if plain:
        monkeypatch.setattr(hashes, "_LIBRARY", None)
    elif hashes._LIBRARY is None:
        pytest.skip("the library is not built here")
    rng = random.Random(3)
    drawn = [tuple(rng.choice((0, 4, 60, 64, 4096, rng.randrange(40_000))) for _ in range(9)) for _ in range(30)]
    pairs = [*pairwise([*LENGTHS, *drawn]), *((lengths, lengths) for lengths in drawn)]
    pairs += [((1 << 20,), (1 << 20,)), ((1 << 20,), (5,)), ((70_001,) * 9, (130_003,) * 7), ((4096,), (1 << 20, 0))]
    for lengths in pairs:
        data = [rng.randbytes(sum(own) + 1)[1:] for own in lengths]
        for block in (64, 1000, 4096):
            first, second = ((data[at], lengths[at]) for at in (0, 1))
            found = sha256_two_chunks((first, second), block)
            for own, (bytes_of, pieces) in zip(found, (first, second), strict=True):
                assert own == (expected(bytes_of, pieces, block), hashlib.sha256(bytes_of).digest())
    with pytest.raises(ValueError, match="pieces of 9 bytes in 10"):
        sha256_two_chunks(((bytes(10), (10,)), (bytes(10), (4, 5))), 64)


def test_any_memory_is_taken_and_let_go() -> None:
    data = random.Random(1).randbytes(10_001)
    with mmap.mmap(-1, 16_384) as mapped:  # cannot be closed while anybody holds it
        mapped[1:10_002] = data
        with memoryview(mapped)[1:10_002] as view:
            whole = [sha256_leaves(kind, (10_001,), 4096, whole=True) for kind in (data, bytearray(data), view)]
    assert whole[0] == whole[1] == whole[2]
    assert whole[0][1] == hashlib.sha256(data).digest()


def test_pieces_that_are_not_all_of_it_are_refused() -> None:
    with pytest.raises(ValueError, match="pieces of 9 bytes in 10"):
        sha256_leaves(bytes(10), (4, 5), 64, whole=True)


@pytest.mark.parametrize("plain", [False, True], ids=["library", "zlib"])
def test_sums_are_zlibs(plain: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if plain:
        monkeypatch.setattr(hashes, "_LIBRARY", None)
    elif hashes._LIBRARY is None:
        pytest.skip("the library is not built here")
    data = random.Random(2).randbytes(70_000)
    for first, end in ((0, 0), (0, 1), (3, 66), (1, 70_000), (0, 65_536)):
        with memoryview(data)[first:end] as view:
            assert crc32(view) == zlib.crc32(view)
            assert crc32(view, 0x12345678) == zlib.crc32(view, 0x12345678)


def test_the_version_is_the_header_s() -> None:
    header = Path(__file__).parents[2] / "trainer" / "engine" / "core" / "hash_leaves.h"
    assert f"#define HS_HASH_VERSION {hashes.VERSION}\n" in header.read_text()


ALL = "int hs_crc32, hs_sha256_leaves, hs_sha256_two_chunks;\n"
OTHER = {
    "no library": "",
    "of another version": "int hs_crc32;\n",
    "without a version": ALL,
    "with other structures": f"{ALL}unsigned hs_hash_version = {hashes.VERSION + 1};\n",
}


@pytest.mark.parametrize("what", OTHER)
def test_a_library_that_does_not_fit_is_told(tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    old = tmp_path / "trainer" / "bin" / hashes.NAME
    old.parent.mkdir(parents=True)
    if what == "no library":
        old.write_bytes(b"not an ELF file")
    else:
        (tmp_path / "old.c").write_text(OTHER[what])
        subprocess.run([find("cc"), "-shared", "-o", str(old), str(tmp_path / "old.c")], check=True)
    monkeypatch.setattr(wire, "__file__", str(tmp_path / "trainer" / "wire" / "__init__.py"))
    monkeypatch.setattr(sysconfig, "get_path", lambda _kind: str(tmp_path))
    library, why = hashes._open()
    assert library is None
    assert f"{old} is not of this version and machine (" in why
