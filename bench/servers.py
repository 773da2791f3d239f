"""Servers in processes of their own: started, waited for, and ended."""

import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait(name: str, url: str, server: subprocess.Popen, timeout: float, pause: float, more: str = "") -> None:
    """Waits until the server answers. more: ends the message where it does not."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        if server.poll() is not None:
            raise SystemExit(f"{name} ended with {server.returncode}{more}")
        try:
            urllib.request.urlopen(f"{url}/health", timeout=5).close()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(pause)
    raise SystemExit(f"{name} did not answer within {timeout:.0f} s{more}")


@contextmanager
def serving(command: Sequence[str], port: int, timeout: float = 120) -> Iterator[tuple[subprocess.Popen, str]]:
    """A server at that port and its address, until the block ends."""
    url = f"http://127.0.0.1:{port}"
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            wait(command[0], url, server, timeout, 0.1)
            yield server, url
        finally:
            server.terminate()
