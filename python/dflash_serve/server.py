"""The server's process: its socket, and its end."""

import asyncio
import signal
import socket
from collections.abc import Callable
from copy import deepcopy

import uvicorn
from starlette.types import ASGIApp
from uvicorn.config import LOGGING_CONFIG

from dflash_decode.cli.streams import UsageError, reason

from .desk import Desk

# uvicorn's own, with a line for each request, but without those for its start and end.
_LOGS = deepcopy(LOGGING_CONFIG)
_LOGS["loggers"]["uvicorn"]["level"] = _LOGS["loggers"]["uvicorn.error"]["level"] = "WARNING"
_KEPT_ALIVE = 75  # seconds: longer than clients keep an idle connection, which they would else find closed
_LAST_WORDS = 5.0  # seconds in which clients are told that their answers ended


def bound(host: str, port: int) -> socket.socket:
    """A socket that refuses connections until the server listens. Raises UsageError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        made = socket.socket(family, kind, protocol)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
        return made
    except (OSError, UnicodeError) as error:
        raise UsageError(f"--host and --port must be an address that is free here; got {host[:80]!r} and {port}: "
                         f"{reason(error)}") from None


def address(bound_to: socket.socket) -> str:
    host, port = bound_to.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


class Server(uvicorn.Server):
    """Ends at SIGTERM or SIGINT: it takes no more requests, and gives those that run `patience` seconds. ready: is
    called once it listens. access_log: a line for each request, on standard output."""

    def __init__(self, app: ASGIApp, desk: Desk, patience: float, ready: Callable[[], None] = lambda: None,
                 access_log: bool = False):
        super().__init__(uvicorn.Config(app, log_config=_LOGS, access_log=access_log, lifespan="off", ws="none",
                                        server_header=False, timeout_keep_alive=_KEPT_ALIVE,
                                        timeout_graceful_shutdown=int(patience + _LAST_WORDS) + 1))
        self._desk, self._patience, self._ready = desk, patience, ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        timer = asyncio.get_running_loop().call_later(self._patience, self._desk.stop)
        await super().shutdown(sockets)
        timer.cancel()

    def serve_until_stopped(self, listener: socket.socket) -> None:
        """A signal that stopped the server has had its effect: what uvicorn raises again at its end does nothing."""
        before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            self.run([listener])
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
