"""In every Python process of a tested run, by PYTHONPATH: no socket leaves the machine, and who tries is written down.

The machine's own name and loopback addresses are allowed: the processes of a run meet there.
"""

import ipaddress
import os
import sys

LOOKUPS = {"socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr", "socket.getnameinfo"}
SENDS = {"socket.connect", "socket.sendto", "socket.sendmsg"}


def is_here(host: object) -> bool:
    """Whether a host is this machine, without a look-up."""
    if isinstance(host, bytes):
        host = host.decode()
    if host in (None, "", "localhost", os.uname().nodename):
        return True
    try:
        return ipaddress.ip_address(str(host).partition("%")[0]).is_loopback
    except ValueError:
        return False


def watch(event: str, arguments: tuple[object, ...]) -> None:
    """An audit hook (PEP 578): refuses what would leave the machine."""
    if event in LOOKUPS:
        place = arguments[0]
        host = place[0] if isinstance(place, tuple) else place
    elif event in SENDS and isinstance(arguments[1], tuple):  # a path is a Unix socket, None an established connection
        host = arguments[1][0]
    else:
        return
    if not is_here(host):
        with open(os.environ["FEDSIM_TEST_ATTEMPTS"], "a", encoding="utf-8") as log:
            log.write(f"{event} {host} {sys.argv[:2]}\n")
        raise PermissionError(f"{event}: {host} is beyond this machine")


sys.addaudithook(watch)
