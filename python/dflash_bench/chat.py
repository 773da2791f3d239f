"""A client of OpenAI-compatible chat servers, with streamed answers and /metrics."""

import http.client
import json
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from socket import SHUT_RDWR
from typing import Any
from urllib.parse import urlsplit

from dflash_decode.checkpoint.errors import brief

from .metrics import Drafting, drafting


class ServerError(ValueError):
    """An error that the server would return again."""


class BadUrl(ServerError):
    """A URL that is not the address of a server."""

    exit_code = 2  # of the command line


class Dropped(ServerError):
    """A failure that can succeed on retry: no connection, a broken one, or a busy server."""


@dataclass(frozen=True)
class Reply:
    text: str
    tokens: int
    prompt_tokens: int | None
    finish: str


class ChatServer:
    """A chat server. Each request has its own connection; one ChatServer serves many threads.

    base_url: "http://host:port", with or without "/v1".
    model: its name on the server; by default the first that it lists.
    extra: fields added to every request.
    timeout: the longest silence, in seconds.
    """

    def __init__(self, base_url: str, model: str | None = None, *, api_key: str | None = None,
                 extra: dict | None = None, timeout: float = 600.0):
        try:
            parts = urlsplit(base_url)
            good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:  # brackets of no address, a port of too many digits
            good = False
        if not good:
            raise BadUrl(f"--base-url must be http://HOST[:PORT][/v1]; got {base_url[:100]!r}")
        self._connect = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._where = parts.hostname or "", parts.port
        self._root = parts.path.rstrip("/").removesuffix("/v1")
        self.url = f"{parts.scheme}://{parts.netloc}{self._root}"
        key = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._headers = {"Content-Type": "application/json"} | key
        self._extra, self._timeout = extra or {}, timeout
        self._lock, self._closed = threading.Lock(), False
        self._open: set[Any] = set()
        self.model = model or self._first_model()

    def _first_model(self) -> str:
        found = self._json("/v1/models")
        try:
            return found["data"][0]["id"]
        except (KeyError, IndexError, TypeError):
            raise ServerError(f"{self.url}/v1/models: expected a list of models; got {brief(found)}") from None

    def _json(self, path: str) -> dict:
        text = self._get(path)
        try:
            return json.loads(text)
        except ValueError:
            raise ServerError(f"{self.url}{path}: expected JSON; got {text[:60]!r}") from None

    def _get(self, path: str) -> str:
        with _Exchange(self, "GET", path) as response:
            return response.read().decode("utf-8", "replace")

    def metrics(self) -> Drafting | None:
        """Draft counters, or None if the server has no /metrics or none about drafting."""
        try:
            return drafting(self._get("/metrics"))
        except ServerError:
            return None

    def chat(self, messages: list[dict], max_tokens: int) -> Reply:
        """The greedy answer. Raises ServerError, or Dropped where a retry can help."""
        body = {"model": self.model, "messages": messages, "max_tokens": max_tokens, "temperature": 0.0, "stream": True,
                "stream_options": {"include_usage": True}} | self._extra
        with _Exchange(self, "POST", "/v1/chat/completions", json.dumps(body).encode()) as response:
            return self._reply(response)

    def _reply(self, response: http.client.HTTPResponse) -> Reply:
        pieces, finish, usage, whole = [], None, None, False
        for event in _events(response):
            if event is None:
                whole = True
                break
            if "error" in event:
                raise ServerError(f"{self.url}: {_message(event)}")
            usage = event.get("usage") or usage
            for choice in event.get("choices") or ():
                pieces.append((choice.get("delta") or {}).get("content") or "")
                finish = choice.get("finish_reason") or finish
        if finish is None or not (usage or whole):  # the usage comes after the reason, and [DONE] after that
            raise Dropped(f"{self.url}: the stream broke off after {sum(map(len, pieces))} characters")
        if not usage or not isinstance(usage.get("completion_tokens"), int):
            raise ServerError(f"{self.url}: expected usage.completion_tokens at the end of the stream "
                              f"(stream_options.include_usage); got {usage!r}")
        return Reply("".join(pieces), usage["completion_tokens"], usage.get("prompt_tokens"), finish)

    def abort(self) -> None:
        """Aborts every running request, from any thread, and refuses new ones until resume()."""
        with self._lock:
            self._closed = True
            for socket in self._open:
                with suppress(OSError):  # the other side was faster
                    socket.shutdown(SHUT_RDWR)

    def resume(self) -> None:
        self._closed = False


class _Exchange:
    """A request and its response as a context. Transport errors become Dropped, a refusal becomes ServerError."""

    def __init__(self, server: ChatServer, method: str, path: str, body: bytes | None = None):
        self.server, self.request = server, (method, f"{server._root}{path}", body, server._headers)
        self.what = f"{server.url}{path}"
        self.connection = server._connect(*server._where, timeout=server._timeout)
        self.socket: Any = None

    def __enter__(self) -> http.client.HTTPResponse:
        try:
            self.connection.connect()
            self.socket = self.connection.sock  # http.client lets go of it before the response is read
            with self.server._lock:
                if self.server._closed:
                    raise Dropped(f"{self.what}: aborted")
                self.server._open.add(self.socket)
            self.connection.request(*self.request)
            response = self.connection.getresponse()
            if response.status != 200:
                self._refused(response)
            return response
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise

    def _refused(self, response: http.client.HTTPResponse) -> None:
        text = response.read(2000).decode("utf-8", "replace")
        try:
            text = _message(json.loads(text))
        except ValueError:
            text = " ".join(text.split())
        kind = Dropped if response.status == 429 or response.status >= 500 else ServerError
        raise kind(f"{self.what}: {response.status} {response.reason}: {text[:300]}")

    def __exit__(self, kind, error, trace) -> None:
        with self.server._lock:
            self.server._open.discard(self.socket)
        self.connection.close()
        if isinstance(error, (OSError, http.client.HTTPException, ValueError)) and not isinstance(error, ServerError):
            raise Dropped(f"{self.what}: {brief(error)}") from None


def _events(response: http.client.HTTPResponse) -> Iterator[dict | None]:
    """The JSON objects of a stream of server-sent events, and None for its [DONE]."""
    while line := response.readline():
        if not line.startswith(b"data:"):
            continue
        data = line[5:].strip()
        if data == b"[DONE]":
            yield None
            return
        try:
            event = json.loads(data)
        except ValueError:
            return  # cut off in the middle of an event
        if isinstance(event, dict):
            yield event


def _message(answer: object) -> str:
    """The text of an error in any of the forms that servers use."""
    error = answer.get("error", answer) if isinstance(answer, dict) else answer
    text = error.get("message") or error.get("detail") if isinstance(error, dict) else error
    return " ".join(str(text or error).split())
