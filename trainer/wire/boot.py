"""Which boot of this machine's kernel this is: numbers of processes, and their start times, are of one boot."""

from pathlib import Path


def boot_id() -> str:
    """Another one after every boot; empty where the kernel does not say."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""
