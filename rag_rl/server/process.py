"""The process: a port, a token, and an end that loses no request."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import signal
import socket
import threading
from pathlib import Path

import uvicorn

from rag_rl.errors import ConfigError
from rag_rl.retrieval.http import TOKEN_ENV, check_token
from rag_rl.server.service import Service, make_app

logger = logging.getLogger(__name__)

# After SIGTERM: how long connections that are open may still bring requests, and how long their replies may take.
_LINGER_S = 0.5
_STOP_PATIENCE_S = 60
# Longer than a client keeps a connection that it does not use: the client closes it, not the server under its hands.
_KEEP_ALIVE_S = 75


def bind(host: str, port: int) -> socket.socket:
    """A listening socket, so that a port that is taken is an error before anything is loaded.

    Args:
        host: a name or an address.
        port: 0 for any that is free.

    Returns:
        The socket.

    Raises:
        ConfigError: the port is taken, or may not be used, or there is no such host.
    """
    if not 0 <= port <= 65_535:
        raise ConfigError(f"port must be between 0 and 65535, got {port}")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(f"cannot listen on host {host!r}: {error.strerror or error}") from error
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(2048)
    except OSError as error:
        sock.close()
        remedy = (
            "another server has it: give another --port"
            if error.errno == errno.EADDRINUSE
            else "give another --host or --port"
        )
        raise ConfigError(f"cannot listen on {host} port {port} ({error.strerror}): {remedy}") from error
    return sock


class Server(uvicorn.Server):
    """uvicorn around a service: opens the retriever once it listens, and stops without losing a request.

    At the end (SIGTERM, SIGINT, or a retriever that cannot be opened) it first takes no further connections, goes on
    answering those that are open for half a second, telling each to close, and then waits for the replies that are
    still due.

    Args:
        service: answers requests.
    """

    def __init__(self, service: Service) -> None:
        config = uvicorn.Config(
            make_app(service),
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=_STOP_PATIENCE_S,
        )
        super().__init__(config)
        self.service = service

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Starts to listen, then opens the retriever.

        Args:
            sockets: from ``bind``.
        """
        await super().startup(sockets=sockets)
        self.service.search.start(self._opened)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stops.

        Args:
            sockets: as in ``startup``.
        """
        self.service.stopping = True
        for listening in self.servers:
            listening.close()
        if self.service.search.about is not None:
            await asyncio.sleep(_LINGER_S)
        await super().shutdown(sockets=sockets)
        self.service.search.stop()

    def _opened(self) -> None:
        search = self.service.search
        if search.about is None:
            self.should_exit = True
        else:
            logger.info("ready: %s passages, fingerprint %s", search.about.passages, search.about.fingerprint)


def serve(service: Service, sock: socket.socket) -> None:
    """Serves until SIGTERM or SIGINT.

    Args:
        service: answers requests.
        sock: from ``bind``.

    Raises:
        UserError: the retriever cannot be opened.
        BackendError: the same, for want of a service that it needs.
    """
    server = Server(service)

    def stop(*_: object) -> None:
        server.should_exit = True

    # uvicorn takes the signals while it runs, gives them back and raises them once more: then there is nothing to do.
    main = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT) if main}
    host, port = sock.getsockname()[:2]
    logger.info("listening on http://%s:%d", f"[{host}]" if ":" in host else host, port)
    try:
        server.run(sockets=[sock])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if service.search.failure is not None:
        raise service.search.failure
    logger.info(
        "stopped: %d requests accepted, %d answered, in %d searches",
        service.accepted, service.answered, service.search.batches,
    )  # fmt: skip


def read_token(env: str = TOKEN_ENV, path: str | Path | None = None) -> str | None:
    """The bearer token that clients must bring.

    Args:
        env: name of an environment variable.
        path: a file that holds it, which wins.

    Returns:
        The token; None where neither is set.

    Raises:
        ConfigError: the file cannot be read, or the token is none that a header can hold.
    """
    if path is None:
        token = os.environ.get(env, "")
        return check_token(token, f"the environment variable {env}") if token else None
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise ConfigError(f"token_file {path} cannot be read: {reason}") from error
    return check_token(text.strip(), f"the file {path}")
