"""The command `dflash-kernels`: info, generate, bench decode, bench protocol, bench ops.

Exit codes: 0, 2 for a command that was written wrongly, 130 after Ctrl-C, 1 for everything else.
"""

import json
import secrets
import sys
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

from . import cli_protocol, cli_repository
from .cli_streams import describe, drop_output, end, prepare
from .options import (
    BlockSize,
    By,
    Debug,
    Device,
    Draft,
    DraftersWeights,
    DraftWeights,
    Dtype,
    FirstSeed,
    From,
    MaxNewTokens,
    MinP,
    Model,
    ModelWeights,
    Rule,
    SampleFrom,
    Seed,
    Temperature,
    Temperatures,
    Threads,
    TopK,
    TopP,
    UsageError,
    Weights,
    Where,
    check_device,
    check_files,
    read_prompt,
    set_threads,
)

app = typer.Typer(name="dflash-kernels", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
                  help="DFlash speculative decoding with kernels of its own.")
bench_app = typer.Typer(no_args_is_help=True, help="Measure.")
app.add_typer(bench_app, name="bench")

INTERRUPTED = 130


def show_version(wanted: bool) -> None:
    if wanted:
        print(version("dflash-kernels"))
        raise typer.Exit


@app.callback()
def options(version: Annotated[bool, typer.Option("--version", callback=show_version, is_eager=True,
                                                  help="Show the version and exit.")] = False) -> None:
    pass


# Heavy modules are imported inside the commands: --help and usage errors answer at once.


@app.command()
def info(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False, debug: Debug = False) -> None:
    """Versions, what is built, which instruction set runs, what is missing and how to get it."""
    from . import report

    found = report.facts()
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        report.print_info(found)


@app.command()
def generate(
    prompt: Annotated[str, typer.Option(help="What the user says; '-' reads it from standard input.")],
    model: Model = "smollm2",
    draft: Draft = "auto",
    weights: ModelWeights = Weights.model,
    draft_weights: DraftWeights = DraftersWeights.auto,
    block_size: BlockSize = None,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    seed: Seed = None,
    sample_from: From = SampleFrom.greedy,
    rule: By = Rule.token,
    dtype: Dtype = "bfloat16",
    device: Where = Device.cpu,
    threads: Threads = None,
    compare: Annotated[bool, typer.Option("--compare", help="Also decode plainly, and compare.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
    debug: Debug = False,
) -> None:
    """Answer one prompt, streamed, and say how fast."""
    text = read_prompt(prompt)
    from .weights import drafter_of

    draft = drafter_of(model, draft)
    if draft == "none" and block_size is not None:
        raise UsageError("--block-size needs a drafter: --draft DIRECTORY or --draft random")
    set_threads(threads)
    check_device(device)
    from . import report
    from .bench import header
    from .sampling import Sampling
    from .session import Session

    sampling = Sampling(temperature, top_k, top_p, min_p, secrets.randbits(31) if seed is None else seed)
    how = {"sampling": sampling, "sample_from": sample_from.value, "rule": rule.value}
    session = Session.load(model, draft, block_size=block_size, dtype=dtype, device=device.value,
                           weights=weights.value, draft_weights=draft_weights.value,
                           status=report.status)
    report.start_text(session)
    ids = session.prompt_ids(text)
    stream, pieces = session.tokenizer.stream(), []

    def show(_index, tokens):
        pieces.append(stream.push(tokens))
        if not as_json:
            report.write(pieces[-1])

    try:
        run = session.run([ids], max_new_tokens=max_new_tokens, on_tokens=show, **how)
        pieces.append(stream.flush())
        if not as_json:
            report.write(pieces[-1])
    finally:
        if not as_json and any(pieces):
            report.write("\n")  # what follows, an error or the shell's prompt, starts a line
    plain = None
    if compare:
        with report.status("decoding plainly, to compare"):
            plain = session.run([ids], max_new_tokens=max_new_tokens, speculative=False, **how)
    if as_json:
        value = report.answer_json(session, run, plain, "".join(pieces))
        options = settings(sampling, sample_from, rule) | {"temperature": temperature}
        print(json.dumps(header(session, prompt=text, max_new_tokens=max_new_tokens, **options)
                         | {"kind": "generate"} | value, indent=1, ensure_ascii=False))
    else:
        report.print_answer(session, ids, run, plain, sampling, sample_from.value)


@bench_app.command("decode")
def bench_decode(
    prompts: Annotated[list[Path], typer.Option(help='JSON lines: {"task": ..., "id": ..., "turns": [text, ...]}; '
                                                     "may be given several times.")],
    model: Model = "smollm2",
    draft: Draft = "auto",
    limit: Annotated[int | None, typer.Option(min=1, help="Take the first N prompts of each file.")] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests decoded together.")] = 1,
    max_new_tokens: MaxNewTokens = 256,
    weights: ModelWeights = Weights.model,
    draft_weights: DraftWeights = DraftersWeights.auto,
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
    peers: Annotated[str | None, typer.Option(help="Instead: our loop and these decoders in turn, each in a process of "
                                              "its own, of ours8,dflash,transformers,vllm,llama, or all. Needs the "
                                              "source repository; its `make peers` installs them.")] = None,
    json_out: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
    debug: Debug = False,
) -> None:
    """Decode prompts with the drafter and plainly, in one process: speed, acceptance, and whether the text is the same.

    The first turn of each row is the prompt."""
    from .weights import drafter_of

    draft = drafter_of(model, draft)
    if peers is not None:
        check_files(prompts, {"--json": json_out})
        known = dtype in ("bfloat16", "float32")
        if temperature != [0.0] or not known or device is not Device.cpu or weights is not Weights.model:
            raise UsageError("--peers are compared on the CPU, greedy, in bfloat16 or float32; ours in 8 bits is one")
        return cli_repository.peers(peers, prompts, {
            "model": model, "draft": draft, "limit": limit, "concurrency": concurrency, "threads": threads,
            "max_new_tokens": max_new_tokens, "block_size": block_size, "dtype": dtype, "json": json_out})
    if draft == "none":
        raise UsageError("--draft must be a drafter's directory or 'random'; plain decoding is measured beside it")
    check_files(prompts, {"--json": json_out})
    set_threads(threads)
    check_device(device)
    from . import bench, report
    from .results import write_json
    from .sampling import Sampling
    from .session import Session

    samplings = [Sampling(value, top_k, top_p, min_p, seed) for value in temperature]
    rows = [row for file in prompts for row in bench.read_prompts(file, limit)]
    session = Session.load(model, draft, block_size=block_size, dtype=dtype, device=device.value,
                           weights=weights.value, draft_weights=draft_weights.value,
                           status=report.status)
    report.start_text(session)
    with report.err.status("") if report.err.is_terminal else nullcontext() as shown:
        def on_task(task, what):
            if shown:
                shown.update(f"[dim]{report.escape(task)}, {what} ...[/dim]")

        results = [bench.bench_decode(session, rows, concurrency=concurrency, max_new_tokens=max_new_tokens,
                                      sampling=sampling, sample_from=sample_from.value, rule=rule.value,
                                      on_task=on_task) for sampling in samplings]
    if sample_from is SampleFrom.request and max(temperature) > 0:
        report.notice(report.DRAWN_NOTICE)
    report.print_bench(results)
    if json_out is not None:
        header = bench.header(session, concurrency=concurrency, max_new_tokens=max_new_tokens,
                              prompts=[file.name for file in prompts], limit=limit,
                              **settings(samplings[0], sample_from, rule))
        many = {"kind": "decode by temperature", "temperatures": results}
        write_json(json_out, header | (results[0] if len(results) == 1 else many))


def settings(sampling, sample_from: SampleFrom, rule: Rule) -> dict:
    """What results say of how tokens were drawn, the temperature apart."""
    return {"top_k": sampling.top_k, "top_p": sampling.top_p, "min_p": sampling.min_p, "seed": sampling.seed,
            "sample_from": sample_from.value, "rule": rule.value}


bench_app.command("protocol")(cli_protocol.protocol)
bench_app.command("ops")(cli_repository.ops)


def run(arguments: list[str]) -> int:
    """The exit code of the command; an error is one line on standard error."""
    debug = "--debug" in arguments
    try:
        code = app(arguments, prog_name="dflash-kernels", standalone_mode=False)
        code = code if isinstance(code, int) else 0
        return end("interrupted" if code == INTERRUPTED else "", code)  # some versions of typer catch Ctrl-C
    except (KeyboardInterrupt, typer.Abort):
        return end("interrupted", INTERRUPTED)
    except BrokenPipeError:  # the reader of the output left
        drop_output()
        return 1
    except typer.Exit as done:
        return end("", done.exit_code)
    except Exception as error:
        if debug:
            raise
        # Our usage errors and those of the command line library carry the exit code that they mean.
        return end(describe(error), 2 if getattr(error, "exit_code", 1) == 2 else 1)


def main() -> None:
    prepare()
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
