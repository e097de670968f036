"""Servers on the loopback interface: a chat server that answers as it is told, and a port that nobody listens on."""

from __future__ import annotations

import json
import socket
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class ChatServer(ThreadingHTTPServer):
    """Answers chat requests by its ``reply``, which a kind of its own defines; ``with`` stops it."""

    request_queue_size = 128  # as many connect at once as a run asks at once: none is to be refused
    usage: dict[str, int] | None = None  # the tokens that it says an answer took

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), ChatHandler)
        self.address = f"127.0.0.1:{self.server_port}/v1"
        self.url = f"http://{self.address}"
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def reply(self, body: dict[str, Any]) -> tuple[int, str]:
        """Status and text of the answer to a request; with another status than 200 the text is the error's.

        Requests that come at once are answered at once, each in a thread of its own.
        """
        raise NotImplementedError

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Says nothing of a client that hung up: a run that stops closes its connections."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()


class ChatHandler(BaseHTTPRequestHandler):
    """One connection to a ChatServer."""

    protocol_version = "HTTP/1.1"
    server: ChatServer

    def do_POST(self) -> None:
        status, text = self.server.reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        body: dict[str, Any] = {"error": {"message": text}}
        if status == 200:
            choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
            body = {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
            if self.server.usage is not None:
                body["usage"] = self.server.usage
        payload = json.dumps(body).encode()
        try:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(payload)))
            self.end_headers()
            self.wfile.write(payload)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass
