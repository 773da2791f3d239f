"""The command: what it prints, how it ends, and what it refuses."""

import importlib.metadata
import re
import signal
import socket
import subprocess
import sys

import openai
import pytest

from tests.support import tiny
from tests.support.cli_calls import environment, heed_interrupts, one_line
from tests.support.serving import CONTEXT, request

pytestmark = pytest.mark.skipif(
    "serve" not in importlib.metadata.entry_points(group="dflash_kernels.commands").names,
    reason="the package was installed before it had this command")
NO_END = {str(tiny.VOCAB - 1): -100}


@pytest.fixture
def started(files):
    """started(*options): a server's process, and its address."""
    running = []

    def start(*options, **variables):
        command = [sys.executable, "-m", "dflash_decode.cli", "serve", "--model", files[0], "--drafter", files[1],
                   "--name", "tiny", "--port", "0", "--dtype", "float32", *options]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                   env=environment(**variables), preexec_fn=heed_interrupts)
        running.append(process)
        line = process.stderr.readline()
        said = re.fullmatch(r"serving tiny on (http://127\.0\.0\.1:\d+)/v1 \(Ctrl-C ends\)\n", line)
        assert said, line + process.stderr.read()
        return process, said[1]

    yield start
    for process in running:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("number, options, variables, context", [
    (signal.SIGTERM, [], {}, CONTEXT),
    (signal.SIGINT, ["--max-context", "512", "--no-access-log"], {"DFLASH_API_KEY": "secret"}, 512)])
def test_a_signal_ends_it_after_the_answers_that_run(started, llm, number, options, variables, context):
    process, url = started(*options, **variables)
    assert request(url, "GET", "/v1/models")[0] == (401 if variables else 200)
    with openai.OpenAI(base_url=f"{url}/v1", api_key="secret", max_retries=0) as client:
        assert client.models.retrieve("tiny").max_model_len == context
        stream = client.completions.create(model="tiny", prompt="abc", max_tokens=300, stream=True, logit_bias=NO_END)
        text = next(stream).choices[0].text
        process.send_signal(number)
        text += "".join(chunk.choices[0].text for chunk in stream)
    assert text == llm.generate("abc", max_tokens=300, logit_bias={tiny.VOCAB - 1: -100}).text
    out, err = process.communicate()
    assert (process.returncode, err) == (0, "")
    logged = re.findall(r'^INFO: +127\.0\.0\.1:\d+ - "(.*)" (.*)$', out, re.MULTILINE)  # as uvicorn's are
    assert logged == ([] if "--no-access-log" in options else [
        ("GET /v1/models HTTP/1.1", "200 OK"), ("GET /v1/models/tiny HTTP/1.1", "200 OK"),
        ("POST /v1/completions HTTP/1.1", "200 OK")]) and len(logged) == len(out.splitlines())
    with pytest.raises(OSError):
        request(url, "GET", "/health")


def test_what_is_wrong_is_one_line(call, files):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        code, out, err = call("serve", "--model", files[0], "--drafter", files[1], "--port", port)
        assert (code, out) == (2, "") and one_line(err) and f"got '127.0.0.1' and {port}" in err
    for options in (["--port", "65536"], ["--port", "x"], ["--host", "no.such.host.invalid"], ["--host", ""],
                    ["--max-batch", "0"], ["--max-queue", "-1"], ["--max-body", "0"], ["--stop-timeout", "-1"],
                    ["--stop-timeout", "nan"], ["--stop-timeout", "soon"], ["--api-key", " "], ["--name", ""],
                    ["--api-key", "a\nb"], ["--api-key", "ü"], ["--max-context", "1"],
                    ["--drafter", "none", "--block-size", "4"], ["--model", "no/such"]):
        code, out, err = call("serve", "--model", files[0], "--port", "0", *options)
        assert (code, out) == (2, "") and one_line(err), (options, err)


@pytest.mark.parametrize("name", ["starlette", "uvicorn", "prometheus_client"])
def test_a_missing_package_is_named_with_its_extra(call, monkeypatch, name):
    real = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda wanted: None if wanted == name else real(wanted))
    code, _, err = call("serve", "--port", "0")
    assert code == 2 and err == (f"dflash-kernels: serve needs {name}, of the extra serve: "
                                 "in a clone, pip install --no-build-isolation '.[serve]'\n")


def test_the_help_loads_no_heavy_package():
    words = ("import sys, dflash_decode.cli as cli; sys.argv[1:] = ['serve', '--help']\ntry: cli.main()\n"
             "finally: assert not {'torch', 'starlette', 'uvicorn'} & set(sys.modules)")
    done = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True, env=environment())
    assert done.returncode == 0 and "--max-queue" in done.stdout, done.stderr
