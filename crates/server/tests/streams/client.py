"""Exec and port-forward with the Python client: argument 1 is the server's URL, argument 2 a port that echoes."""

import sys

from kubernetes import client
from kubernetes.stream import portforward, stream

configuration = client.Configuration()
configuration.host = sys.argv[1]
api = client.CoreV1Api(client.ApiClient(configuration))
connect_exec, connect_forward = api.connect_get_namespaced_pod_exec, api.connect_get_namespaced_pod_portforward

out = stream(connect_exec, "web", "default", command=["echo", "hello"], stdout=True, stderr=True, stdin=False, tty=False)
assert out == "hello\n", repr(out)

session = stream(
    connect_exec,
    "web",
    "default",
    command=["sh", "-c", "read line; echo got $line; echo oops >&2; exit 7"],
    stdout=True,
    stderr=True,
    stdin=True,
    tty=False,
    _preload_content=False,
)
session.write_stdin("words\n")
session.run_forever(timeout=60)
assert session.read_stdout() == "got words\n"
assert session.read_stderr() == "oops\n"
assert session.returncode == 7, session.returncode

port = int(sys.argv[2])
forward = portforward(connect_forward, "web", "default", ports=str(port))
connection = forward.socket(port)
connection.settimeout(60)
sent = bytes(range(256)) * 4096
connection.sendall(sent)
got = b""
while len(got) < len(sent):
    piece = connection.recv(65536)
    assert piece, "ended early"
    got += piece
assert got == sent
assert forward.error(port) is None, forward.error(port)
connection.close()
print("ok")
