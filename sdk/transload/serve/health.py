"""Whether an engine answers: one bounded HTTP request, and whether a port is free."""

from __future__ import annotations

import errno
import http.client
import re
import socket
import urllib.error
import urllib.request

from transload.errors import ConfigError


def healthy(url: str, timeout: float) -> bool:
    """True when the URL answers 200 within `timeout` seconds. Proxies from the environment are not used."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=timeout) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, TimeoutError, OSError, ValueError, http.client.HTTPException):
        return False


def running_requests(url: str, timeout: float) -> int | None:
    """Requests that an engine has begun or queued, as its Prometheus page says; None when it does not."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=timeout) as answer:
            page = answer.read(16 << 20).decode("utf-8", "replace")
    except (urllib.error.URLError, TimeoutError, OSError, ValueError, http.client.HTTPException):
        return None
    found = re.findall(r"^vllm:num_requests_(?:running|waiting)(?:\{[^}]*\})? ([0-9.e+]+)$", page, re.MULTILINE)
    return int(sum(map(float, found))) if found else None


def check_port(host: str, port: int, what: str, option: str) -> None:
    """Raises ConfigError when nothing could listen on host:port now."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"{what}: '{host}' is not an address of this machine: {error}") from error
    with socket.socket(family, kind, proto) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
            probe.listen(1)
        except OSError as error:
            raise ConfigError(_refused(host, port, what, option, error)) from error


def _refused(host: str, port: int, what: str, option: str, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"{what}: port {port} is in use; end the program that uses it (ss -ltnp), or give another {option}"
    if error.errno == errno.EADDRNOTAVAIL:
        return f"{what}: {host} is not an address of this machine; compare with `ip -brief address`"
    if error.errno == errno.EACCES:
        return f"{what}: port {port} needs privileges; give one above 1023 with {option}"
    return f"{what}: cannot listen on {host}:{port}: {error.strerror}"


def free_port(host: str = "127.0.0.1") -> int:
    """A port that is free now."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])
