"""Stands in for `vllm serve`: says the lines of a real start, answers HTTP, drains, and fails on request.

FAKE_ENGINE names a JSON file: log (lines to say), seconds (of one answer), fail (lines to say and then exit with
`code`), fail_times (only so often, counted in the file `count`), deaf (never healthy), hang (ignore SIGTERM).
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

given = json.loads(Path(os.environ["FAKE_ENGINE"]).read_text()) if "FAKE_ENGINE" in os.environ else {}
active, closing, lock = 0, threading.Event(), threading.Lock()


def option(name: str, default: str) -> str:
    return sys.argv[sys.argv.index(name) + 1] if name in sys.argv else default


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, code: int, body: object) -> None:
        data = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        if self.path == "/metrics":
            page = f'vllm:num_requests_running{{engine="0"}} {active}.0\nvllm:num_requests_waiting{{engine="0"}} 0.0\n'
            self.send_response(200)
            self.send_header("Content-Length", str(len(page)))
            self.end_headers()
            self.wfile.write(page.encode())
            return
        code = 503 if given.get("deaf") else 200
        self.answer(code, {"data": [{"id": option("--served-model-name", "?")}], "server_load": active})

    def do_POST(self) -> None:
        global active
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if closing.is_set():
            self.answer(500, {"error": {"message": "cannot schedule new futures after shutdown"}})
            return
        with lock:
            active += 1
        try:
            if asked.get("stream"):
                self.stream(asked)
            else:
                time.sleep(given.get("seconds", 0.05))
                self.answer(200, {"choices": [{"message": {"content": said(asked)}, "finish_reason": "stop"}]})
        finally:
            with lock:
                active -= 1

    def stream(self, asked: dict) -> None:
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        words = [*said(asked).split(), None]
        for word in words:
            time.sleep(given.get("seconds", 0.05) / len(words))
            choice = {"delta": {"content": word}, "finish_reason": None if word else "stop"}
            self.piece(f"data: {json.dumps({'choices': [choice]})}\n\n")
        self.piece("data: [DONE]\n\n")
        self.piece("")

    def piece(self, text: str) -> None:
        self.wfile.write(f"{len(text):x}\r\n{text}\r\n".encode())
        self.wfile.flush()


def said(asked: dict) -> str:
    return f"echo: {asked['messages'][-1]['content']}"


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128


def say(lines: str) -> None:
    for line in lines.splitlines():
        print(line, flush=True)


def fail() -> bool:
    if "fail" not in given:
        return False
    if "fail_times" not in given:
        return True
    count = Path(given["count"])
    before = int(count.read_text()) if count.exists() else 0
    count.write_text(str(before + 1))
    return before < given["fail_times"]


def main() -> None:
    if "--error" in sys.argv:
        sys.exit("vllm serve: error: unrecognized arguments: --error")
    stop = threading.Event()
    signal.signal(signal.SIGTERM, signal.SIG_IGN if given.get("hang") else lambda *_: stop.set())
    say(given.get("log", ""))
    if fail():
        say(given["fail"])
        sys.exit(given.get("code", 1))
    server = None
    if "--headless" not in sys.argv:
        server = Server((option("--host", ""), int(option("--port", "8000"))), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
    while not stop.wait(0.05):
        pass
    closing.set()
    deadline = time.monotonic() + float(option("--shutdown-timeout", "0"))
    while active and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.1 if server else 0)  # the last answer is on its way
    print("[shutdown] done", flush=True)


main()
