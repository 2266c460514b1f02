"""Python imports this by itself when its folder is on PYTHONPATH: no connection leaves this machine.

Attempts raise and are noted in the file NETWORK_LOG, so that one which is caught and forgotten is still seen.
Where PROMPTREC_ABSENT is set, the promptrec installed from this clone cannot be imported.
"""

import os
import socket
import sys

LOCAL = ("127.", "localhost", "::1", "0.0.0.0")


def _refuse(what: str) -> None:
    with open(os.environ["NETWORK_LOG"], "a") as log:
        log.write(f"{what}\n")
    raise OSError(f"the network is off: {what}")


def _guarded(connect):
    def guarded(self, address, *rest):
        if self.family != socket.AF_UNIX and not str(address[0]).startswith(LOCAL):
            _refuse(f"connection to {address}")
        return connect(self, address, *rest)

    return guarded


def _resolve(host, *rest, _real=socket.getaddrinfo, **options):
    name = host.decode() if isinstance(host, bytes) else host
    if name and not name.startswith(LOCAL) and name != socket.gethostname():
        _refuse(f"look-up of {name}")
    return _real(host, *rest, **options)


if "NETWORK_LOG" in os.environ:
    socket.socket.connect = _guarded(socket.socket.connect)
    socket.socket.connect_ex = _guarded(socket.socket.connect_ex)
    socket.getaddrinfo = _resolve

if "PROMPTREC_ABSENT" in os.environ:
    sys.meta_path[:] = [finder for finder in sys.meta_path if "promptrec" not in getattr(finder, "__module__", "")]
