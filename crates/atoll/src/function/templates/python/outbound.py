"""Requests of the function's own, to hosts that `atoll function deploy --allow-outbound HOST` names."""

from urllib.parse import urlsplit

from componentize_py_types import Err, Ok
from wit_world.imports import outgoing_handler
from wit_world.imports.streams import StreamError_Closed
from wit_world.imports.types import (
    Fields,
    Method_Delete,
    Method_Get,
    Method_Head,
    Method_Options,
    Method_Other,
    Method_Patch,
    Method_Post,
    Method_Put,
    OutgoingBody,
    OutgoingRequest,
    RequestOptions,
    Scheme_Http,
    Scheme_Https,
)

CHUNK = 4096
METHODS = {
    "DELETE": Method_Delete,
    "GET": Method_Get,
    "HEAD": Method_Head,
    "OPTIONS": Method_Options,
    "PATCH": Method_Patch,
    "POST": Method_Post,
    "PUT": Method_Put,
}


def send(method: str, url: str, headers: dict[str, str] | None = None, body: bytes = b"", timeout: float = 30):
    """Status, headers and body of the answer. `timeout`: seconds to connect, and to wait for anything to come."""
    where = urlsplit(url)
    if where.scheme not in ("http", "https") or not where.netloc:
        raise ValueError(f"{url!r}: http://HOST/PATH or https://HOST/PATH is needed")
    lines = [(name.lower(), value.encode()) for name, value in (headers or {}).items()]
    if body and "content-length" not in (name for name, _ in lines):
        lines.append(("content-length", str(len(body)).encode()))
    request = OutgoingRequest(Fields.from_list(lines))
    request.set_method(METHODS[method]() if method in METHODS else Method_Other(method))
    request.set_scheme(Scheme_Https() if where.scheme == "https" else Scheme_Http())
    request.set_authority(where.netloc)
    request.set_path_with_query((where.path or "/") + (f"?{where.query}" if where.query else ""))
    options, nanoseconds = RequestOptions(), int(timeout * 1e9)
    options.set_connect_timeout(nanoseconds)
    options.set_first_byte_timeout(nanoseconds)
    options.set_between_bytes_timeout(nanoseconds)
    sent = request.body()
    coming = outgoing_handler.handle(request, options)
    with sent.write() as stream:
        for start in range(0, len(body), CHUNK):
            stream.blocking_write_and_flush(body[start : start + CHUNK])
    OutgoingBody.finish(sent, None)
    with coming.subscribe() as ready:
        ready.block()
    match coming.get():
        case Ok(Ok(response)):
            answered = {name: value.decode("latin-1") for name, value in response.headers().entries()}
            return response.status(), answered, read(response)
        case Ok(Err(why)):
            raise OSError(f"{method} {url}: {why}")
        case other:
            raise OSError(f"{method} {url}: no answer ({other})")


def read(message) -> bytes:
    """The body of a request or an answer."""
    with message.consume() as body, body.stream() as stream:
        parts = []
        while True:
            try:
                parts.append(stream.blocking_read(65536))
            except Err as end:
                if isinstance(end.value, StreamError_Closed):
                    return b"".join(parts)
                raise
