"""A bucket on loopback: an emulator of Google's storage, with what TensorStore needs besides.

    python tests/bucket.py PORT

The emulator knows no preconditions and does not name the generation of what it sends. A checkpoint
is written with both: nobody may overwrite what another has written in between.
"""

import contextlib
import http
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import fsspec
import pytest
from gcp_storage_emulator import server
from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import objects


@contextlib.contextmanager
def running() -> Iterator[subprocess.Popen]:
    """The bucket gs://bucket, for this process and those that it starts; yields the server."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, __file__, str(port)]
    silent = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, **silent) as server, pytest.MonkeyPatch.context() as patch:
        # One for each client: fsspec's, that of epath, that of TensorStore.
        for name in (
            "STORAGE_EMULATOR_HOST", "CLOUD_STORAGE_EMULATOR_ENDPOINT", "TENSORSTORE_GCS_HTTP_URL",
        ):  # fmt: skip
            patch.setenv(name, f"http://127.0.0.1:{port}")
        patch.setenv("FSSPEC_GCS_TOKEN", "anon")
        fsspec.config.set_conf_env(fsspec.config.conf)
        try:
            assert server.stdout.readline() == b"ready\n"
            yield server
        finally:
            fsspec.filesystem("gcs").clear_instance_cache()
            del fsspec.config.conf["gcs"]["token"]
            server.kill()


def _generation(storage, bucket: str, name: str) -> str:
    try:
        return storage.get_file_obj(bucket, name)["generation"]
    except NotFound:
        return "0"


def _name(request) -> str:
    if "object_id" in request.params:
        return request.params["object_id"]
    if "name" in request.query:
        return request.query["name"][0]
    content = request.data if isinstance(request.data, dict) else {}  # of several parts
    return content.get("meta", content)["name"]


def _conditional(handle):
    """The same handler, under the preconditions of the request."""

    def conditional(request, response, storage, *args, **kwargs):
        found = _generation(storage, request.params["bucket_name"], _name(request))
        if request.query.get("ifGenerationMatch", [found]) != [found]:
            response.status = http.HTTPStatus.PRECONDITION_FAILED
        elif request.query.get("ifGenerationNotMatch") == [found]:
            response.status = http.HTTPStatus.NOT_MODIFIED
        else:
            response["x-goog-generation"] = found
            handle(request, response, storage, *args, **kwargs)

    return conditional


def main() -> None:
    objects.download = _conditional(objects.download)  # which `get` calls by this name
    for _, handlers in server.HANDLERS:
        for method, handle in handlers.items():
            if handle in (objects.insert, objects.delete):
                handlers[method] = _conditional(handle)
    port = int(sys.argv[1])
    server.create_server("127.0.0.1", port, in_memory=True, default_bucket="bucket").start()
    print("ready", flush=True)
    time.sleep(3600)


if __name__ == "__main__":
    main()
