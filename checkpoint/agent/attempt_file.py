"""The attempt file (``wire/attempt.h``): all that a rank is told beside its plan.

The attempt's key derives from the launch's and the epoch, the gang's nonce from that key: equal on every node, without
an exchange.
"""

from __future__ import annotations

import ctypes
import hashlib
import hmac
import os
import struct
from collections.abc import Mapping

from checkpoint.agent.algorithms import digest
from checkpoint.agent.crc32c import crc32c
from checkpoint.agent.events import Address
from checkpoint.agent.gang import Gang, Options
from checkpoint.agent.prepare import Provisions
from checkpoint.amendments import Amendments
from trainer import wire


def attempt_bytes(options: Options, gang: Gang, has: Provisions, nodes: Mapping[int, Address]) -> bytes:
    """The attempt file of a prepared gang: ``nodes`` is where everybody listens."""
    assert has.data_dir is not None
    key = hmac.new(options.key, struct.pack("<Q", gang.epoch), hashlib.sha256).digest()
    head = wire.Attempt()
    head.magic[:], head.version = wire.ATTEMPT_MAGIC, wire.ATTEMPT_VERSION
    head.run, head.epoch = options.run.encode(), gang.epoch
    head.plan_digest[:], head.key[:] = has.layout.digest, key
    nonce = hmac.new(key, b"gang", hashlib.sha256).digest()[:16]  # the same on every node, without an exchange
    head.nonce[:] = nonce
    head.ranks = gang.attempt.ranks
    head.kernel_path = wire.PATHS[str(gang.how("launch", "kernel_path"))]
    head.start_step, head.stop_after = has.start_step, int(gang.how("launch", "stop_after"))
    head.connect_ms = _ms(gang.how("launch", "connect_s"))
    head.stall_ms = _ms(gang.how("launch", "stall_s"))
    head.commit_ms = _ms(gang.how("checkpoint", "commit_s"))
    head.trace = int(bool(gang.how("launch", "trace")))
    kind = nodes[options.node].devices.kind
    head.device_kind = wire.DEVICES[kind]
    head.data_ahead = int(has.ahead is not None)
    if kind != "cpu":
        head.algorithms_digest[:] = digest(options.work)
    amended = gang.attempt.amendments
    head.total_steps, head.skips, head.rates = amended.steps, len(amended.skip), len(amended.rate)
    head.data_dir, head.work_dir = os.fsencode(has.data_dir), os.fsencode(options.work)
    ranks = b"".join(
        bytes(wire.AttemptRank(host.encode(), port, node, devices.device(local)))
        for node, (host, ports, devices) in sorted(nodes.items())
        for local, port in enumerate(ports)
    )
    rest = ranks + amendment_bytes(amended)
    crc_at = wire.Attempt.crc.offset + ctypes.sizeof(wire.u32)
    head.crc = crc32c(bytes(head)[crc_at:], rest)
    return bytes(head) + rest


def amendment_bytes(amended: Amendments) -> bytes:
    """The records that follow those of the ranks."""
    skips = (bytes(wire.AttemptSkip(first, last)) for first, last in amended.skip)
    return b"".join((*skips, *(bytes(wire.AttemptRate(step, factor)) for step, factor in amended.rate)))


def _ms(seconds: object) -> int:
    return max(1, min(0xFFFFFFFF, round(float(str(seconds)) * 1000)))
