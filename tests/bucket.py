"""A bucket on this machine: an emulator of Google Cloud Storage, with conditions on generations and moving added.

python -m tests.bucket PORT
"""

import contextlib
import re
import sys
from collections.abc import Callable
from http import HTTPStatus

from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import objects

NAME = "pod"


def environment(port: int) -> dict[str, str]:
    """What makes gcsfs, tensorstore and array_record ask here."""
    address = f"http://127.0.0.1:{port}"
    return {
        "STORAGE_EMULATOR_HOST": address,
        "TENSORSTORE_GCS_HTTP_URL": address,
        "CLOUD_STORAGE_EMULATOR_ENDPOINT": address,
        "FSSPEC_GCS_TOKEN": "anon",
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        "NO_GCE_CHECK": "true",
        "GCE_METADATA_HOST": "127.0.0.1:1",
    }


def _with_generations(handler: Callable) -> Callable:
    def handle(request, response, storage, *args, **kwargs):
        bucket = request.params["bucket_name"]
        name = request.params.get("object_id") or request.query.get("name", [None])[0]
        if name is None:  # of several parts, the name in one of them: without conditions
            return handler(request, response, storage, *args, **kwargs)

        def generation() -> str:
            try:
                return str(storage.get_file_obj(bucket, name)["generation"])
            except NotFound:
                return "0"

        if request.query.get("ifGenerationMatch", [generation()])[0] != generation():
            response.status = HTTPStatus.PRECONDITION_FAILED
        elif request.query.get("ifGenerationNotMatch", [""])[0] == generation():
            response.status = HTTPStatus.NOT_MODIFIED
        else:
            if tail := re.fullmatch(r"bytes=-(\d+)", request.get_header("range", None) or ""):
                size = int(storage.get_file_obj(bucket, name)["size"])
                request._request_handler.headers.replace_header("range", f"bytes={max(size - int(tail[1]), 0)}-")
            handler(request, response, storage, *args, **kwargs)
            response["x-goog-generation"] = generation()

    return handle


def move(request, response, storage, *args, **kwargs):
    request.params["dest_bucket_name"] = request.params["bucket_name"]
    objects.copy(request, response, storage)
    with contextlib.suppress(NotFound):  # which the response says already
        storage.delete_file(request.params["bucket_name"], request.params["object_id"])


if __name__ == "__main__":
    for handler in ("get", "download", "insert", "delete"):
        setattr(objects, handler, _with_generations(getattr(objects, handler)))
    from gcp_storage_emulator import server  # only now: it takes the handlers by value

    moving = r"^.*/b/(?P<bucket_name>[-.\w]+)/o/(?P<object_id>.+)/moveTo/o/(?P<dest_object_id>.+)$"
    server.HANDLERS = ((moving, {"POST": move}), *server.HANDLERS)
    server.create_server("127.0.0.1", int(sys.argv[1]), in_memory=True, default_bucket=NAME).run()
