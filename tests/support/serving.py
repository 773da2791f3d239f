"""A server in a thread of this process, and what it is asked."""

import http.client
import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import sleep

import torch

from dflash_serve.app import Settings, build
from dflash_serve.server import Server, address, bound
from tests.support import tiny

CONTEXT, BATCH = 1024, 4
TEMPLATE = ("{% if tools %}<u>{{ tools | tojson }} <tool_call>{name, arguments}</tool_call>{% endif %}{{ mood }}"
            "{% for m in messages %}<u>{{ m.role }}: {{ m.content }}{% for c in m.tool_calls or [] %}"
            "{{ c.function.arguments.city }}{% endfor %}{{ m.name }}{{ m.tool_call_id }}{{ m.reasoning_content }}"
            "{% endfor %}{% if add_generation_prompt %}<a>{% endif %}")
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {
    "type": "object", "properties": {"city": {"type": "string"}}}}}


def write_models(folder: Path, template: str = TEMPLATE) -> tuple[Path, Path]:
    """A target whose context has room for tools, and its drafter."""
    target = tiny.write_target(folder / "target")
    for name, changes in (("config.json", {"max_position_embeddings": CONTEXT}),
                          ("tokenizer_config.json", {"chat_template": template})):
        (target / name).write_text(json.dumps(json.loads((target / name).read_text()) | changes))
    return target, tiny.write_drafter(folder / "draft", max_position_embeddings=CONTEXT)


@contextmanager
def serving(llm, patience: float = 60.0, max_batch: int = BATCH, **settings) -> Iterator[Server]:
    """A running server. Its `url` and `desk` are those of the application."""
    app, desk = build(llm, Settings(**{"name": "tiny"} | settings), max_batch)
    server, listener = Server(app, desk, patience), bound("127.0.0.1", 0)
    server.url, server.desk = address(listener), desk
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    until(lambda: server.started)
    try:
        yield server
    finally:
        server.should_exit = True
        thread.join()


def until(true) -> None:
    """Waits for what another thread does."""
    for _ in range(2000):
        if true():
            return
        sleep(0.01)
    raise AssertionError("it did not happen")


def request(url: str, method: str, path: str, body: object = None, timeout: float = 100.0,
            **headers: str) -> tuple[int, dict, str]:
    """(status, headers, text). body: bytes as they are, or JSON. timeout: the longest silence."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=timeout)
    if body is not None and not isinstance(body, bytes):
        body = json.dumps(body).encode()
    connection.request(method, path, body, {"Content-Type": "application/json"} | headers)
    answer = connection.getresponse()
    found = answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read().decode()
    connection.close()
    return found


class Scripted:
    """A grammar that lets one text be written, or raises."""

    def __init__(self, tokens: Sequence[int] | None, end: int = tiny.VOCAB - 1):
        self._tokens, self._end = tokens, end

    def fill_bitmask(self, tokens, words: torch.Tensor) -> None:
        if self._tokens is None:
            raise KeyError("no")
        token = self._tokens[len(tokens)] if list(tokens) == list(self._tokens[:len(tokens)]) and len(tokens) < len(
            self._tokens) else self._end
        words.zero_()
        words[token // 32] = 1 << token % 32 if token % 32 < 31 else -2**31
