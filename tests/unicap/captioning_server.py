"""A server that speaks OpenAI's protocol on loopback, and misbehaves as it is told to."""

import base64
import contextlib
import io
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from PIL import Image

from tests.unicap.small_captioner import SmallCaptioner

# misbehave(number of the request, its body) -> how, or None to answer as one should.
Misbehave = Callable[[int, dict[str, Any]], str | None]


# Their text ("" is the right one), and why they end.
_ODD_ANSWERS = {
    "no text": (None, "stop"),
    "only thought": (None, "length"),
    "filtered": ("", "content_filter"),
    "aborted": ("A plain", "abort"),
    "half a letter": ("A \ud83d surface", "stop"),
}


class CaptioningServer(ThreadingHTTPServer):
    """What it does wrong: see `_Handler._misbehave`."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(
        self,
        misbehave: Misbehave = lambda number, body: None,
        models: Sequence[str] = ("small-vl",),
        port: int = 0,
    ):
        super().__init__(("127.0.0.1", port), _Handler)
        self.misbehave, self.models, self.captioner = misbehave, models, SmallCaptioner()
        self.lock = threading.Lock()
        self.num_requests = self.under_way = self.most_under_way = 0
        self.times: list[float] = []
        self.keys: set[str | None] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request, client_address) -> None:
        """Clients break off when a server is slow; that is what is tested."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._send(200, {"data": [{"id": name} for name in self.server.models]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with self.server.lock:
            number = self.server.num_requests
            self.server.num_requests += 1
            self.server.times.append(time.monotonic())
            self.server.keys.add(self.headers.get("authorization"))
            self.server.under_way += 1
            self.server.most_under_way = max(self.server.most_under_way, self.server.under_way)
        try:
            how = self.server.misbehave(number, body)
            if how is None:
                self._send(200, self._answer(body))
            else:
                self._misbehave(how, body)
        finally:
            with self.server.lock:
                self.server.under_way -= 1

    def _answer(self, body: dict[str, Any]) -> dict[str, Any]:
        prompt, image = "", None
        for part in body["messages"][0]["content"]:
            if part["type"] == "text":
                prompt = part["text"]
            else:
                content = base64.b64decode(part["image_url"]["url"].partition(",")[2])
                image = Image.open(io.BytesIO(content)).convert("RGB")
        known = prompt != "Say yes."
        text = self.server.captioner.answer(prompt, image) if known else "Yes."
        return {
            "choices": [{"message": {"content": text}, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 1000 if image else 300, "completion_tokens": len(text) // 4},
        }

    def _misbehave(self, how: str, body: dict[str, Any]) -> None:
        if how.isdecimal():
            self._send(int(how), {"error": {"message": f"told to answer {how}"}})
        elif how == "busy":
            self._send(429, {"error": "busy"}, {"Retry-After": "0.2"})
        elif how == "no JSON":
            self._send(200, b"<html>502 Bad Gateway</html>")
        elif how == "other JSON":
            self._send(200, {"object": "error"})
        elif how in _ODD_ANSWERS:
            answer = self._answer(body)
            choice = answer["choices"][0]
            text, choice["finish_reason"] = _ODD_ANSWERS[how]
            choice["message"]["content"] = choice["message"]["content"] if text == "" else text
            self._send(200, answer)
        elif how == "endless usage":
            answer = self._answer(body) | {"usage": {"prompt_tokens": float("inf")}}
            self._send(200, answer)
        elif how == "hang":
            time.sleep(1.0)
        elif how == "cut":  # breaks off in the middle of the answer
            content = json.dumps(self._answer(body)).encode()
            self._head(200, {"Content-Length": str(len(content))})
            self.wfile.write(content[: len(content) // 2])
            self.wfile.flush()
            self._hang_up()
        elif how == "reset":
            self._hang_up()
        elif how == "dribble":  # a byte now and then, for longer than anybody waits
            self._head(200, {"Content-Length": "100000"})
            with contextlib.suppress(OSError):
                for _ in range(100):
                    self.wfile.write(b" ")
                    self.wfile.flush()
                    time.sleep(0.05)
        elif how == "endless":
            self._head(200, {"Transfer-Encoding": "chunked"})
            block = b"100000\r\n" + b" " * 0x100000 + b"\r\n"
            with contextlib.suppress(OSError):
                for _ in range(64):
                    self.wfile.write(block)
        else:
            raise ValueError(how)

    def _hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def _send(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self._head(status, {"Content-Length": str(len(content)), **(headers or {})})
        self.wfile.write(content)

    def _head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()


@contextlib.contextmanager
def running(*args: Any, **kwargs: Any) -> Iterator[CaptioningServer]:
    with CaptioningServer(*args, **kwargs) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
