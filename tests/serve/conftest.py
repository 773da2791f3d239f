import importlib.util
from dataclasses import replace

import pytest

from dflash_decode import LLM, costs

if all(importlib.util.find_spec(name) for name in ("openai", "prometheus_client", "starlette", "uvicorn")):
    import openai

    from tests.support import serving
else:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True)
def no_costs_are_left(monkeypatch):
    """What a step costs is measured, and written nowhere."""
    monkeypatch.setattr(costs, "cache_dir", lambda: None)


@pytest.fixture(scope="package")
def files(tmp_path_factory):
    """A target and its drafter."""
    return serving.write_models(tmp_path_factory.mktemp("serve"))


@pytest.fixture(scope="package")
def llm(files):
    with LLM(*files, max_batch=serving.BATCH, dtype="float32") as made:
        yield made


@pytest.fixture(scope="package")
def server(llm):
    with serving.serving(llm) as made:
        yield made


@pytest.fixture(scope="package")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="EMPTY", max_retries=0) as made:
        yield made


@pytest.fixture
def script(llm, monkeypatch):
    """script(prompt's text, text): what the model writes from now on; None: an answer that fails."""
    texts, real = {}, llm.asubmit

    async def asubmit(prompt, params, **rest):
        asked = llm.tokenizer.decode(prompt, False)
        for part, text in texts.items():
            if part in asked:
                params = replace(params, grammar=serving.Scripted(text if text is None else llm.tokenizer.encode(text)))
        return await real(prompt, params, **rest)

    monkeypatch.setattr(llm, "asubmit", asubmit)
    return texts.__setitem__
