"""Kernels in a program of their own (programs/kernel_serve.c): those of another processor, static, under qemu's user
emulation; and this one's as ThreadSanitizer builds them.
"""

from __future__ import annotations

import shutil
import struct
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from k8s.images.static import compiler
from tests.engine.kernel_lib import Array, marshalled
from trainer import wire

DIGEST_BYTES = 2 * 32 + 3 * 4 + 1


def cross_compiler(name: str) -> str | None:
    """A compiler for arm64: ``zig``, the pinned one; ``gcc``, Debian's, None where it is not installed."""
    return shutil.which("aarch64-linux-gnu-gcc") if name == "gcc" else str(compiler("aarch64-linux-musl") / "cc")


def emulator(machine: str = "aarch64") -> str | None:
    """qemu's user emulation of a processor; None where it is not installed."""
    return shutil.which(f"qemu-{machine}-static") or shutil.which(f"qemu-{machine}")


class ServedKernels:
    """Calls like KernelLib's, answered by a program; what it says on its standard error is the test's."""

    def __init__(self, *command: str | Path) -> None:
        self.process = subprocess.Popen(
            list(map(str, command)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=-1
        )

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        assert self.process.wait(60) == 0

    def call(
        self,
        kernel: str,
        dtype: int,
        ptrs: Sequence[Array | None],
        dims: Sequence[int],
        reals: Sequence[float] = (),
        *,
        set_name: str = "ref",
        threads: int = 1,
        guard: str | None = None,
    ) -> None:
        number, _, sizes, d, r = marshalled(kernel, ptrs, dims, reals)
        head = struct.pack("<16s4I", set_name.encode(), number, dtype, threads, (None, "before", "after").index(guard))
        rc = self._ask(head + bytes(sizes) + bytes(d) + bytes(r), ptrs)
        assert rc == 0, f"{kernel} of {set_name}: status {rc} (1000 + n: signal n), dims {list(dims)}"

    def digests(self, data: bytes) -> tuple[list[bytes], list[int], bool]:
        """SHA-256 by instructions and without; CRC-32C likewise, and CRC-32; whether there are instructions."""
        out = np.zeros(DIGEST_BYTES, np.uint8)
        ptrs = [np.frombuffer(data, np.uint8).copy(), out]
        sizes = [x.nbytes for x in ptrs] + [0] * (wire.CALL_PTRS - 2)
        head = struct.pack(f"<16s4I{wire.CALL_PTRS}Q", b"", 0, 0, 1, 0, *sizes)
        assert self._ask(head + bytes(8 * (wire.CALL_DIMS + wire.CALL_REALS)), ptrs) == 0
        said = out.tobytes()
        return [said[:32], said[32:64]], list(struct.unpack_from("<3I", said, 64)), bool(said[76])

    def _ask(self, head: bytes, ptrs: Sequence[Array | None]) -> int:
        assert self.process.stdin
        assert self.process.stdout
        given = [x for x in ptrs if x is not None]
        self.process.stdin.write(head + b"".join(x.tobytes() for x in given))
        self.process.stdin.flush()
        rc = int(struct.unpack("<i", self._take(4))[0])
        for x in given:
            x[...] = np.frombuffer(self._take(x.nbytes), x.dtype).reshape(x.shape)
        return rc

    def _take(self, count: int) -> bytes:
        assert self.process.stdout
        said = self.process.stdout.read(count)
        assert len(said) == count, f"the program ended with {self.process.wait(60)}"
        return said
