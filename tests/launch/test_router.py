"""The rendered router, run by nginx before two engines that only count."""

from __future__ import annotations

import http.client
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from transload.launch import router

NGINX = shutil.which("nginx") or shutil.which("/usr/sbin/nginx")
pytestmark = pytest.mark.skipif(NGINX is None, reason="nginx is not installed")


class Engine(ThreadingHTTPServer):
    """Counts requests and answers with two pieces, the second only when `go` is set."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.requests = 0
        self.go = threading.Event()
        self.go.set()
        threading.Thread(target=self.serve_forever, daemon=True).start()


class _Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Engine

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.server.requests += 1
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self._chunk(b"first ")
        self.server.go.wait(20)
        self._chunk(b"second")
        self._chunk(b"")

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.flush()

    def log_message(self, format: str, *args: object) -> None:
        return


@pytest.fixture
def engines() -> Iterator[list[Engine]]:
    made = [Engine(), Engine()]
    yield made
    for engine in made:
        engine.shutdown()
        engine.server_close()


@pytest.fixture
def port(engines: list[Engine], tmp_path: Path) -> Iterator[int]:
    """The port of a router with weights 5 and 2; a third engine does not exist."""
    with socket.socket() as free, socket.socket() as dead:
        free.bind(("127.0.0.1", 0))
        dead.bind(("127.0.0.1", 0))
        port, nobody = free.getsockname()[1], dead.getsockname()[1]
    servers = [(f"127.0.0.1:{e.server_port}", w, "an engine") for e, w in zip(engines, (5, 2), strict=True)]
    text = router.text([*servers, (f"127.0.0.1:{nobody}", 1, "an engine that is down")])
    text = text.replace("worker_processes auto", "worker_processes 1").replace(
        "/tmp/transload", f"{tmp_path}/transload"
    )
    config = tmp_path / "nginx.conf"
    config.write_text(text.replace(f"listen {router.PORT}", f"listen 127.0.0.1:{port}"))
    command = [str(NGINX), "-p", str(tmp_path), "-e", "stderr", "-g", "daemon off;", "-c", str(config)]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as run:
        try:
            _until_up(port)
            yield port
        finally:
            run.terminate()
            run.wait(timeout=20)


def _until_up(port: int) -> None:
    for _ in range(400):
        try:
            socket.create_connection(("127.0.0.1", port), timeout=5).close()
            return
        except OSError:
            time.sleep(0.05)
    raise AssertionError("nginx does not listen")


def _ask(port: int) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request("POST", "/v1/completions", body=b"x" * 10)
    return connection.getresponse()


def test_requests_are_shared_by_weight_and_none_is_lost_to_an_engine_that_is_down(
    port: int, engines: list[Engine]
) -> None:
    for _ in range(70):
        assert _ask(port).read() == b"first second"
    assert sum(e.requests for e in engines) == 70
    assert 45 <= engines[0].requests <= 55  # five of seven are 50


def test_pieces_of_an_answer_pass_at_once(port: int, engines: list[Engine]) -> None:
    for engine in engines:
        engine.go.clear()
    answer = _ask(port)
    assert answer.read1(100) == b"first "  # the second piece has not been sent
    for engine in engines:
        engine.go.set()
    assert answer.read() == b"second"


def test_the_router_answers_for_itself(port: int) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request("GET", "/router/health")
    answer = connection.getresponse()
    assert (answer.status, answer.read()) == (200, b"ok\n")
