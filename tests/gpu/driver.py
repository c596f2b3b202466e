"""What the CUDA driver says of its devices: those that a process gets, in CUDA's order (``CUDA_VISIBLE_DEVICES``,
``CUDA_DEVICE_ORDER``, MIG), where nvidia-smi lists the machine's, and is not in every container.

    python -m tests.gpu.driver     a line of JSON: {"driver": 13000, "devices": [...]}, or {"why": "..."}

Asked in a process of its own: a driver may hang.
"""

from __future__ import annotations

import ctypes
import json
import sys
import uuid
from typing import Any

LIBRARY = "libcuda.so.1"
MAJOR, MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*


class Refused(Exception):
    """The driver's own name of an error."""


def _checked(c: ctypes.CDLL, name: str, *arguments: Any) -> None:
    code = getattr(c, name)(*arguments)
    if code != 0:
        text = ctypes.c_char_p()
        c.cuGetErrorName(code, ctypes.byref(text))
        raise Refused(f"{name}: error {code}{f' ({text.value.decode()})' if text.value else ''}")


def _device(c: ctypes.CDLL, number: int) -> dict[str, str]:
    device, name, own = ctypes.c_int(), ctypes.create_string_buffer(128), (ctypes.c_ubyte * 16)()
    major, minor, size = ctypes.c_int(), ctypes.c_int(), ctypes.c_size_t()
    _checked(c, "cuDeviceGet", ctypes.byref(device), number)
    _checked(c, "cuDeviceGetName", name, len(name), device)
    _checked(c, "cuDeviceGetUuid_v2", own, device)
    _checked(c, "cuDeviceTotalMem_v2", ctypes.byref(size), device)
    _checked(c, "cuDeviceGetAttribute", ctypes.byref(major), MAJOR, device)
    _checked(c, "cuDeviceGetAttribute", ctypes.byref(minor), MINOR, device)
    return {
        "index": str(number),
        "name": name.value.decode(errors="replace"),
        "uuid": str(uuid.UUID(bytes=bytes(own))),  # nvidia-smi puts GPU- or MIG- before it
        "compute_cap": f"{major.value}.{minor.value}",
        "memory.total": str(size.value >> 20),
    }


def told() -> dict[str, Any]:
    """All of it; ``why`` there is no device."""
    try:
        c = ctypes.CDLL(LIBRARY)
    except OSError:
        return {"why": f"there is no driver ({LIBRARY} is not found)"}
    version, count = ctypes.c_int(), ctypes.c_int()
    try:
        _checked(c, "cuInit", 0)
        _checked(c, "cuDriverGetVersion", ctypes.byref(version))
        _checked(c, "cuDeviceGetCount", ctypes.byref(count))
        devices = [_device(c, number) for number in range(count.value)]
    except Refused as error:
        return {"why": f"the driver refuses: {error}"}
    if not devices:
        return {"why": "the driver shows none; look at CUDA_VISIBLE_DEVICES"}
    return {"driver": version.value, "devices": devices}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(told()) + "\n")
