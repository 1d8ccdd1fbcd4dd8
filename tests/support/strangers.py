"""Strangers before a server: what they ask, by HTTP and with Flower's command line, and an app they hand in."""

import http.client
import os
import ssl
import subprocess
import sys
from pathlib import Path

from fsl_sage.commands import federation

STRANGE = """\
from pathlib import Path
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
server, client = ServerApp(), ClientApp()
Path({!r}).touch()
"""


def ask(here, path, headers=None, body=b"", method="POST"):
    """The status of the answer, and its text; or the name of the error."""
    host, port = here.address.split(":")
    if here.certificates:
        context = ssl.create_default_context(cafile=here.certificates / "ca.pem")
        line = http.client.HTTPSConnection(host, int(port), context=context, timeout=60)
    else:
        line = http.client.HTTPConnection(host, int(port), timeout=60)
    try:
        line.request(method, path, body, {"Content-Type": "application/protobuf"} | (headers or {}))
        reply = line.getresponse()
        return reply.status, reply.read(1000).decode("utf-8", "replace")
    except OSError as error:
        return type(error).__name__, ""
    finally:
        line.close()


def flwr(here, folder, *words):
    """Flower's command line, as a stranger has it: with the authority's certificate, if there is one."""
    folder.mkdir(exist_ok=True)
    (folder / "config.toml").write_text(federation.known_server(here.address, here.certificates), "utf-8")
    program, own = Path(sys.executable).parent / "flwr", federation.QUIET | {"FLWR_HOME": str(folder)}
    return subprocess.run([program, *words], env=os.environ | own, capture_output=True, timeout=300)
