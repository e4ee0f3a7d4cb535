"""A function: answers GET with a greeting and POST with what was sent."""

import json

from componentize_py_types import Ok
from outbound import read
from wit_world.exports import IncomingHandler as BaseHandler
from wit_world.imports.types import (
    Fields,
    IncomingRequest,
    Method_Post,
    OutgoingBody,
    OutgoingResponse,
    ResponseOutparam,
)

CHUNK = 4096


def answer(method, path, body: bytes):
    if isinstance(method, Method_Post):
        return 200, {"got": body.decode("utf-8", "replace")}
    return 200, {"hello": path}


class IncomingHandler(BaseHandler):
    def handle(self, request: IncomingRequest, response_out: ResponseOutparam) -> None:
        method, path = request.method(), request.path_with_query() or "/"
        status, value = answer(method, path, read(request))
        print(f"{path}: {status}")
        content = json.dumps(value).encode() + b"\n"
        response = OutgoingResponse(Fields.from_list([("content-type", b"application/json")]))
        response.set_status_code(status)
        body = response.body()
        ResponseOutparam.set(response_out, Ok(response))
        with body.write() as stream:
            for start in range(0, len(content), CHUNK):
                stream.blocking_write_and_flush(content[start : start + CHUNK])
        OutgoingBody.finish(body, None)
