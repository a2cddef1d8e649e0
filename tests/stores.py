"""An object store for tests: moto's S3 over HTTP, in a process of its own."""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress

# One request at a time: moto first looks for an object and then creates it, which S3 does in one
# step. But each is received and answered in its own thread, so that a stalled client blocks nobody.
SERVER = """
import io, sys, threading
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import run_simple

moto, turn = DomainDispatcherApplication(create_backend_app), threading.Lock()

def one_at_a_time(environ, start_response):
    size = None if environ.get("wsgi.input_terminated") else int(environ.get("CONTENT_LENGTH") or 0)
    body = environ["wsgi.input"].read() if size is None else environ["wsgi.input"].read(size)
    environ["wsgi.input"] = io.BytesIO(body)
    with turn:
        answer = moto(environ, start_response)
        try:
            return [b"".join(answer)]
        finally:
            getattr(answer, "close", lambda: None)()

run_simple("127.0.0.1", int(sys.argv[1]), one_at_a_time, threaded=True)
"""
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing-secret",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


@contextmanager
def s3_server() -> Iterator[str]:
    """Yield its address; the environment holds it and the keys, for this process and children."""
    import s3fs

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER, str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    address = f"http://127.0.0.1:{port}"
    before = {name: os.environ.get(name) for name in (*CREDENTIALS, "AWS_ENDPOINT_URL")}
    os.environ.update(CREDENTIALS, AWS_ENDPOINT_URL=address)
    s3fs.S3FileSystem.clear_instance_cache()  # they remember an earlier server
    try:
        deadline = time.monotonic() + 60
        while True:
            with suppress(OSError):
                urllib.request.urlopen(f"{address}/moto-api/", timeout=5).close()
                break
            assert time.monotonic() < deadline, "moto's server does not answer"
            time.sleep(0.05)
        yield address
    finally:
        server.kill()
        server.wait()
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})
        s3fs.S3FileSystem.clear_instance_cache()


def make_bucket(name: str) -> str:
    import s3fs

    s3fs.S3FileSystem().mkdir(name)
    return f"s3://{name}"
