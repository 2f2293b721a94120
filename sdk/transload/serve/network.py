"""Which network interface of this machine has an address."""

from __future__ import annotations

import ipaddress
import json
import shutil
import socket
import subprocess
from contextlib import suppress

_SIOCGIFADDR = 0x8915  # linux/sockios.h: the IPv4 address of an interface


def interface_of(address: str) -> str | None:
    """The interface's name, None when no interface here has the address."""
    wanted = ipaddress.ip_address(address)
    if isinstance(wanted, ipaddress.IPv6Address):
        return _by_iproute(str(wanted))
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = name.encode()[:15].ljust(32, b"\0")
            with suppress(OSError):
                answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)
                if socket.inet_ntoa(answer[20:24]) == str(wanted):
                    return name
    return _by_iproute(str(wanted))


def _by_iproute(address: str) -> str | None:
    """Also finds second addresses of an interface and IPv6."""
    if shutil.which("ip") is None:
        return None
    with suppress(OSError, ValueError, KeyError, subprocess.TimeoutExpired):
        done = subprocess.run(["ip", "-j", "address"], capture_output=True, text=True, timeout=10, check=False)
        for row in json.loads(done.stdout):
            if any(info.get("local") == address for info in row["addr_info"]):
                return str(row["ifname"])
    return None
