"""The commands `dflash-kernels bench decode`, `protocol` and `ops`."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from dflash_decode.choices import AUTO, NONE
from dflash_decode.cli.options import (
    BlockSize,
    By,
    Debug,
    Device,
    DrafterName,
    DraftersWeights,
    DrafterWeights,
    Dtype,
    FirstSeed,
    From,
    MaxTokens,
    MinP,
    Model,
    ModelWeights,
    Rule,
    SampleFrom,
    Temperatures,
    Threads,
    TopK,
    TopP,
    UsageError,
    Weights,
    Where,
    check_device,
    set_threads,
)

from . import cli_protocol, repository
from .options import check_files

app = typer.Typer(no_args_is_help=True, help="Measure decoding, the model card protocol, and single ops.")


@app.command("decode")
def bench_decode(
    prompts: Annotated[list[Path], typer.Option(help='JSON lines: {"task": ..., "id": ..., "turns": [...]}. '
                                                     "Repeatable.")],
    model: Model = "smollm2",
    drafter: DrafterName = "auto",
    limit: Annotated[int | None, typer.Option(min=1, help="Use only the first N prompts of each file.")] = None,
    concurrency: Annotated[list[int], typer.Option(min=1, help="Number of concurrent requests. Repeatable.")
                           ] = [1],  # noqa: B006
    isa: Annotated[list[str] | None, typer.Option(help="Instruction set of the CPU to run with, or 'all' that it has. "
                                                       "Repeatable.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="How often each task runs, without and with the drafter in "
                                                    "turns.")] = 1,
    max_tokens: MaxTokens = 256,
    weights: ModelWeights = Weights.model,
    drafter_weights: DrafterWeights = DraftersWeights.auto,
    block_size: BlockSize = None,
    temperature: Temperatures = [0.0],  # noqa: B006
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    seed: FirstSeed = 0,
    sample_from: From = SampleFrom.greedy,
    rule: By = Rule.token,
    dtype: Dtype = "bfloat16",
    device: Where = Device.cpu,
    threads: Threads = None,
    peers: Annotated[str | None, typer.Option(help="Compare our loop with these decoders instead, each in a process of "
                                              "its own: ours8,oursfile,dflash,transformers,vllm,llama, or "
                                              "all. Needs the "
                                              "source repository, whose `make peers` installs them.")] = None,
    json_out: Annotated[Path | None, typer.Option("--json", help="Write the results to this file.")] = None,
    debug: Debug = False,
) -> None:
    """Compare speculative with baseline decoding in one process: speed, acceptance length, identical output.

    The first turn of each row is the prompt."""
    from dflash_decode.checkpoint import drafter_of, no_drafter

    asked, drafter = drafter, drafter_of(model, drafter)
    if peers is not None:
        check_files(prompts, {"--json": json_out})
        known = dtype in ("bfloat16", "float32")
        if temperature != [0.0] or not known or device is not Device.cpu or weights is not Weights.model:
            raise UsageError("--peers runs on the CPU, greedy, in bfloat16 or float32; for 8 bits name the peer ours8, "
                             "for a file's own weights oursfile")
        if len(concurrency) > 1 or isa:
            raise UsageError("--peers takes one --concurrency, and no --isa")
        return repository.peers(peers, prompts, {
            "model": model, "drafter": drafter, "limit": limit, "concurrency": concurrency[0], "threads": threads,
            "max_tokens": max_tokens, "block_size": block_size, "dtype": dtype, "json": json_out})
    if drafter == NONE:
        why = f"; {no_drafter(model)}" if asked == AUTO else ""
        raise UsageError("--drafter must be a drafter's directory or 'random'; baseline decoding is always measured too"
                         + why)
    check_files(prompts, {"--json": json_out})
    set_threads(threads)
    check_device(device)
    sets, grid = _sets(isa), bool(isa) or len(concurrency) > 1
    if grid and len(temperature) > 1:
        raise UsageError("several --temperature take one --concurrency, and no --isa")
    from dflash_decode.cli import report
    from dflash_decode.sampling import SamplingParams
    from dflash_decode.session import Session

    from . import decode
    from .report import print_bench
    from .results import write_json

    samplings = [SamplingParams(value, top_k, top_p, min_p, seed) for value in temperature]
    rows = [row for file in prompts for row in decode.read_prompts(file, limit)]
    session = Session.load(model, drafter, block_size=block_size, dtype=dtype, device=device.value,
                           weights=weights.value, drafter_weights=drafter_weights.value,
                           status=report.status)
    report.start_text(session)
    with _shown_tasks() as on_task:
        how: dict[str, Any] = {"max_tokens": max_tokens, "sample_from": sample_from.value, "rule": rule.value,
                               "rounds": rounds, "on_task": on_task}
        if grid:
            results = decode.by_instruction_set(session, rows, sets, concurrency, sampling=samplings[0], **how)
        else:
            results = [decode.bench_decode(session, rows, concurrency=concurrency[0], sampling=sampling, **how)
                       for sampling in samplings]
    if sample_from is SampleFrom.request and max(temperature) > 0:
        report.notice(report.DRAWN_NOTICE)
    print_bench(results)
    if json_out is not None:
        header = decode.header(session, concurrency=concurrency if grid else concurrency[0],
                              max_tokens=max_tokens, rounds=rounds,
                              prompts=[file.name for file in prompts], limit=limit,
                              **report.settings(samplings[0], sample_from.value, rule.value))
        many = {"kind": "decode by temperature", "temperatures": results}
        cells = {"kind": "decode by instruction set", "cells": results}
        write_json(json_out, header | (cells if grid else results[0] if len(results) == 1 else many))


def _sets(asked: list[str] | None) -> list[str]:
    """The instruction sets that --isa names."""
    from dflash_kernels import build_info
    from dflash_kernels.testing import every_isa

    there = every_isa()
    for name in asked or []:
        if name not in (*there, "all"):
            raise UsageError(f"--isa must be one of {', '.join(there)} or all; got {name!r}")
    return there if "all" in (asked or []) else list(dict.fromkeys(asked or [str(build_info()["isa"])]))


@contextmanager
def _shown_tasks() -> Iterator[Callable[[str, str], None]]:
    """What a benchmark is to call with each task and what is done with it: shown on a terminal while it runs."""
    from dflash_decode.cli import report

    with report.err.status("") if report.err.is_terminal else nullcontext() as shown:
        def on_task(task, what):
            if shown:
                shown.update(f"[dim]{report.escape(task)}, {what} ...[/dim]")

        yield on_task


app.command("protocol")(cli_protocol.protocol)
app.command("ops")(repository.ops)
