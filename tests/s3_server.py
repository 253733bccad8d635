"""An S3 server: moto's, over HTTP on loopback, in a process of its own; `s3://` leads there by the environment."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import fsspec
import pytest
from ranks import free_port


@contextmanager
def s3_server() -> Iterator[str]:
    """Its URL. There is a bucket named `bucket`."""
    port = free_port()
    words = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    started = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while True:
            with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            assert started.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
            for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
                patch.setenv(name, "test")
            patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
            fsspec.filesystem("s3").mkdir("bucket")
            yield f"http://127.0.0.1:{port}"
            fsspec.filesystem("s3").clear_instance_cache()
    finally:
        started.kill()
        started.wait(10)
