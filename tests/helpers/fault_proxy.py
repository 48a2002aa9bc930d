"""A proxy on loopback between a client and an S3 server, with the faults of networks and stores: 503s, cuts, stalls.

It forwards the client's Host header unchanged, so that the server checks the client's own signature.
"""

import contextlib
import http.client
import re
import socket
import threading
import time
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

ANSWERS = {
    kind: f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()
    for kind, code, message in (
        ("403", "AccessDenied", "Access Denied"),
        ("503", "SlowDown", "Please reduce your request rate."),
        ("501", "NotImplemented", "A header you provided implies functionality that is not implemented."),
    )
}
FOR_EVER = 1 << 30


@dataclass
class Fault:
    """A fault in the next ``times`` requests whose "METHOD /bucket/key?query" matches the pattern.

    Args:
        kind: "503"; "403": denied; "501": not implemented; "lost": done, but the connection ends before the answer;
            "cut": the connection ends after ``after`` bytes of the body, sent or received; "stall": no answer for
            ``seconds``, then the right one.
    """

    kind: str
    pattern: str = ""
    times: int = FOR_EVER
    after: int = 100
    seconds: float = FOR_EVER
    met: int = 0


class FaultProxy:
    """Listens at ``url`` from `__enter__` to `__exit__`; every connection ends with it.

    Attributes:
        faults: the rules; the first that fits a request is what happens to it.
        requests: "METHOD /bucket/key?query" of every request that came.
    """

    def __init__(self, server: str):
        self.server = urlsplit(server).netloc
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.lock = threading.Lock()
        self.ended = threading.Event()
        handler = type("Handler", (_Handler,), {"proxy": self})
        self.listener = ThreadingHTTPServer(("127.0.0.1", 0), handler, bind_and_activate=False)
        self.listener.daemon_threads, self.listener.block_on_close = True, False
        self.listener.request_queue_size = 64
        self.listener.handle_error = lambda *_: None  # a client disconnected
        self.listener.server_bind()
        self.listener.server_activate()
        self.url = f"http://127.0.0.1:{self.listener.server_port}"

    def __enter__(self) -> "FaultProxy":
        threading.Thread(target=self.listener.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.ended.set()
        self.listener.shutdown()
        self.listener.server_close()

    def fault(self, kind: str, pattern: str = "", times: int = FOR_EVER, **options: Any) -> Fault:
        """Adds a rule."""
        self.faults.append(Fault(kind, pattern, times, **options))
        return self.faults[-1]

    def heal(self) -> None:
        """Ends all faults."""
        self.faults.clear()

    def happens_to(self, request: str) -> Fault | None:
        with self.lock:
            self.requests.append(request)
            for fault in self.faults:
                if fault.met < fault.times and re.search(fault.pattern, request):
                    fault.met += 1
                    return fault
        return None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: FaultProxy
    timeout = 60  # an idle connection's

    def handle_one_request(self) -> None:
        with contextlib.suppress(OSError):
            super().handle_one_request()
            return
        self.close_connection = True

    def relay(self) -> None:
        fault = self.proxy.happens_to(f"{self.command} {unquote(self.path)}")
        kind = fault.kind if fault else None
        length = int(self.headers.get("Content-Length", 0))
        if kind == "stall":
            deadline = time.monotonic() + fault.seconds
            while time.monotonic() < deadline:
                if self.proxy.ended.wait(0.05) or fault not in self.proxy.faults:  # healed: no answer any more
                    return self.cut()
        if kind == "cut" and length:
            self.rfile.read(min(fault.after, length - 1))
            return self.cut()
        body = self.rfile.read(length)
        if kind in ANSWERS:
            return self.answer(int(kind), [("Content-Type", "application/xml")], ANSWERS[kind])
        connection = http.client.HTTPConnection(self.proxy.server, timeout=60)
        connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            if name.lower() not in ("connection", "expect"):
                connection.putheader(name, value)
        connection.endheaders(body or None)
        response = connection.getresponse()
        content = response.read()
        if kind == "lost":
            connection.close()
            return self.cut()
        hop = ("connection", "transfer-encoding", "keep-alive") + (
            () if self.command == "HEAD" else ("content-length",)
        )
        headers = [(name, value) for name, value in response.getheaders() if name.lower() not in hop]
        connection.close()
        self.answer(response.status, headers, content, fault.after if kind == "cut" else None)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = relay

    def answer(self, status: int, headers: list[tuple[str, str]], content: bytes, cut: int | None = None) -> None:
        self.send_response_only(status)
        for name, value in headers:
            self.send_header(name, value)
        if self.command != "HEAD":
            self.send_header("Content-Length", str(len(content)))
        if cut is not None and (self.command == "HEAD" or status >= 300 or not content):
            return self.cut()  # without a body to cut, not even the headers are sent
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content if cut is None else content[: min(cut, len(content) - 1)])
        if cut is not None:
            self.cut()

    def cut(self) -> None:
        """Ends the connection."""
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *_: Any) -> None:
        pass
