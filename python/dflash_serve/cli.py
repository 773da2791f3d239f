"""The command `dflash-kernels serve`."""

import functools
import importlib.util
import sys
from typing import Annotated

import typer

from dflash_decode.choices import NONE
from dflash_decode.cli.options import (
    BlockSize,
    Debug,
    Device,
    DrafterName,
    DraftersWeights,
    DrafterWeights,
    Dtype,
    Model,
    ModelWeights,
    Native,
    Threads,
    UsageError,
    Weights,
    Where,
    check_device,
    set_threads,
)
from dflash_decode.extras import how_to_get

_NEEDED = ("starlette", "uvicorn", "pydantic", "prometheus_client")
_DAY = 24 * 3600
_LOOPBACK = ("127.0.0.1", "::1", "localhost")


def read_seconds(text: str | float) -> float:
    try:
        if 0 <= (seconds := float(text)) <= _DAY:
            return seconds
    except ValueError:
        pass
    raise typer.BadParameter(f"{str(text)[:80]!r} is not a number of seconds, at most a day.")


def serve(
    model: Model = "smollm2",
    drafter: DrafterName = "auto",
    host: Annotated[str, typer.Option(help="Address to listen on. 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 8000,
    api_key: Annotated[str | None, typer.Option(envvar="DFLASH_API_KEY", show_envvar=True, help="Requests must carry "
                                                "this key. The environment variable hides it from other users of the "
                                                "machine.")] = None,
    name: Annotated[str | None, typer.Option(help="The model's name for clients; by default that of --model.")] = None,
    max_batch: Annotated[int, typer.Option(min=1, max=1024, help="Answers that are decoded at the same time.")] = 8,
    max_queue: Annotated[int, typer.Option(min=0, max=2**20, help="Further answers that wait; beyond that, clients are "
                                                                  "told to try again (429).")] = 128,
    max_context: Annotated[int | None, typer.Option(min=2, help="The most tokens of a prompt and its answer together; "
                                                                "by default the model's.")] = None,
    max_body: Annotated[int, typer.Option(min=1, max=1024, metavar="MIB", help="The largest request, in MiB.")] = 8,
    stop_timeout: Annotated[float, typer.Option(parser=read_seconds, metavar="SECONDS", help="How long running answers "
                                            "may go on after SIGTERM or Ctrl-C.")] = 30.0,
    access_log: Annotated[bool, typer.Option(help="Print a line for each request.")] = True,
    weights: ModelWeights = Weights.auto,
    drafter_weights: DrafterWeights = DraftersWeights.auto,
    native: Native = False,
    block_size: BlockSize = None,
    dtype: Dtype = "bfloat16",
    device: Where = Device.cpu,
    threads: Threads = None,
    debug: Debug = False,
) -> None:
    """Serve OpenAI's API: chat completions and completions, for one model.

    Concurrent requests are decoded together, and each answer is the one that the request gets alone.
    """
    from dflash_decode.checkpoint import drafter_of
    from dflash_decode.checkpoint.find import without_one

    if missing := [package for package in _NEEDED if importlib.util.find_spec(package) is None]:
        raise UsageError(f"serve needs {missing[0]}, of the extra serve: {how_to_get('serve')}")
    if block_size is not None and drafter_of(model, drafter) == NONE:
        raise UsageError(f"--block-size needs a drafter: {without_one(model, drafter)}")
    for option, value in (("--api-key", api_key), ("--name", name), ("--host", host)):
        if value is not None and not value.strip():
            raise UsageError(f"{option} must not be empty")
    if api_key is not None:
        api_key = api_key.strip()  # a secret's file often ends in a newline
        if not (api_key.isascii() and api_key.isprintable()):
            raise UsageError("--api-key must have printable ASCII characters, as an HTTP header does")
    set_threads(threads)
    check_device(device)
    from dflash_decode import LLM
    from dflash_decode.cli import report

    from .app import Settings, build
    from .server import Server, address, bound

    listener = bound(host, port)
    with listener, LLM(model, drafter, block_size=block_size, dtype=dtype, device=device.value, weights=weights.value,
                       drafter_weights=drafter_weights.value, native=native, max_batch=max_batch,
                       max_context=max_context, status=report.status) as llm:
        report.start_text(llm.session)
        if device is Device.cuda:
            with report.status("compiling and recording"):
                llm.warm_up()
        if host not in _LOOPBACK and api_key is None:
            report.notice("every machine that reaches this address can use the model: --api-key asks for a key")
        settings = Settings(name or model, api_key, max_queue, max_body << 20)
        app, desk = build(llm, settings, max_batch)
        line = f"serving {settings.name} on {address(listener)}/v1 (Ctrl-C ends)"
        ready = functools.partial(print, line, file=sys.stderr, flush=True)
        Server(app, desk, stop_timeout, ready, access_log).serve_until_stopped(listener)
