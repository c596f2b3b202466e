"""PyTorch's Distributed Checkpoint to an S3 server, as a peer of the benchmarks: a process that saves and loads when
it is told to. Runs in an environment of its own (torch is large); imports nothing of this repository.

    python dcp_peer.py s3torchconnector|s3fs ENDPOINT BUCKET BYTES TENSORS

reads lines ``save NAME`` and ``load NAME`` and answers each with its seconds. One process, so no collective is in the
way; as many threads as DCP's own default allows are taken (``thread_count``), and data is not copied beforehand.
"""

from __future__ import annotations

import os
import sys
import time

import torch
import torch.distributed.checkpoint as dcp

THREADS = 4
REGION = "us-east-1"


def ends(way: str, endpoint: str, url: str) -> tuple[object, object]:
    """The writer and the reader of one checkpoint."""
    if way == "s3torchconnector":
        from s3torchconnector import S3ClientConfig
        from s3torchconnector._s3client import S3Client
        from s3torchconnector.dcp.s3_file_system import S3FileSystem, S3StorageReader, S3StorageWriter

        client = S3Client(REGION, endpoint=endpoint, s3client_config=S3ClientConfig(force_path_style=True))
        writer, reader = S3StorageWriter(REGION, url, thread_count=THREADS), S3StorageReader(REGION, url)
        writer.fs = S3FileSystem(REGION, s3_client=client)  # neither takes an endpoint
        reader.fs = S3FileSystem(REGION, s3_client=client)
        return writer, reader
    from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader, FsspecWriter

    how = {"endpoint_url": endpoint, "client_kwargs": {"region_name": REGION}}
    return FsspecWriter(url, thread_count=THREADS, **how), FsspecReader(url, **how)


def main() -> None:
    way, endpoint, bucket, size, count = sys.argv[1:6]
    each = int(size) // int(count) // 4
    generator = torch.Generator().manual_seed(0)
    state = {f"t{i}": torch.rand(each, generator=generator) for i in range(int(count))}
    print("ready", flush=True)
    for line in sys.stdin:
        verb, name = line.split()
        writer, reader = ends(way, endpoint, f"s3://{bucket}/dcp/{name}")
        began = time.monotonic()
        if verb == "save":
            dcp.save(state, storage_writer=writer, no_dist=True)
        else:
            dcp.load(state, storage_reader=reader, no_dist=True)
        print(f"{time.monotonic() - began:.6f}", flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
