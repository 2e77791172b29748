"""Runs a command in a network of its own, with nothing but the loopback interface, and counts what would have left it.

Usage, as root of namespaces of its own: unshare -rnm python alone.py COUNTS.json COMMAND...

The machine's own name and its loopback addresses stand in a hosts file, so that who meets there asks no name server.
"""

import fcntl
import json
import socket
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

SIOCSIFFLAGS, IFF_UP = 0x8914, 1
COUNTED = ("Ip.OutNoRoutes", "Ip6.Ip6OutNoRoutes", "Udp.OutDatagrams", "Ip6.Udp6OutDatagrams")


def counters() -> dict[str, int]:
    """The kernel's counts of this network, by protocol and name."""
    six = Path("/proc/net/snmp6")
    pairs = [line.split() for line in six.read_text(encoding="ascii").splitlines()] if six.exists() else []
    found = {f"Ip6.{name}": int(value) for name, value in pairs}
    lines = Path("/proc/net/snmp").read_text(encoding="ascii").splitlines()
    for names, values in zip(lines[::2], lines[1::2], strict=True):
        protocol, _, rest = names.partition(":")
        counts = values.partition(":")[2].split()
        found |= {f"{protocol}.{name}": int(count) for name, count in zip(rest.split(), counts, strict=True)}
    return {name: found.get(name, 0) for name in COUNTED}


def main() -> int:
    """Returns the command's exit status."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        fcntl.ioctl(control, SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", IFF_UP))
    with tempfile.NamedTemporaryFile("w", suffix=".hosts") as hosts:
        name = socket.gethostname()
        hosts.write(f"127.0.0.1 localhost {name}\n::1 localhost {name}\n")
        hosts.flush()
        subprocess.run(["mount", "--bind", hosts.name, "/etc/hosts"], check=True)
        status = subprocess.run(sys.argv[2:], check=False).returncode
    Path(sys.argv[1]).write_text(json.dumps(counters()), encoding="utf-8")
    return status


if __name__ == "__main__":
    sys.exit(main())
