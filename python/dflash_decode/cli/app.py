"""The command `dflash-kernels`: info and generate, and the commands that other packages register.

Exit codes: 0 for success, 2 for wrong arguments, 130 after Ctrl-C, 1 for every other error.
"""

import json
import secrets
import sys
from importlib.metadata import entry_points, version
from typing import Annotated

import typer

from .options import (
    BlockSize,
    By,
    Debug,
    Device,
    Draft,
    DraftersWeights,
    DraftWeights,
    Dtype,
    From,
    MaxNewTokens,
    MinP,
    Model,
    ModelWeights,
    Rule,
    SampleFrom,
    Seed,
    Temperature,
    Threads,
    TopK,
    TopP,
    UsageError,
    Weights,
    Where,
    check_device,
    read_prompt,
    set_threads,
)
from .streams import describe, drop_output, end, prepare

app = typer.Typer(name="dflash-kernels", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
                  help="DFlash speculative decoding with fused kernels.")
for command in entry_points(group="dflash_kernels.commands"):
    app.add_typer(command.load(), name=command.name)

INTERRUPTED = 130


def show_version(wanted: bool) -> None:
    if wanted:
        print(version("dflash-kernels"))
        raise typer.Exit


@app.callback()
def options(version: Annotated[bool, typer.Option("--version", callback=show_version, is_eager=True,
                                                  help="Show the version and exit.")] = False) -> None:
    pass


# Heavy modules are imported inside the commands, so that --help and usage errors are fast.


@app.command()
def info(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False, debug: Debug = False) -> None:
    """Show versions, built kernels, the instruction set in use, and missing parts with their install commands."""
    from . import report

    found = report.facts()
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        report.print_info(found)


@app.command()
def generate(
    prompt: Annotated[str, typer.Option(help="The user's message; '-' reads standard input.")],
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
    compare: Annotated[bool, typer.Option("--compare", help="Also run baseline decoding, and compare.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
    debug: Debug = False,
) -> None:
    """Answer one prompt, streamed, and report the speed."""
    text = read_prompt(prompt)
    from ..checkpoint import drafter_of

    draft = drafter_of(model, draft)
    if draft == "none" and block_size is not None:
        raise UsageError("--block-size needs a drafter: --draft DIRECTORY or --draft random")
    set_threads(threads)
    check_device(device)

    from ..sampling import SamplingParams
    from ..session import Session
    from . import report

    sampling = SamplingParams(temperature, top_k, top_p, min_p, secrets.randbits(31) if seed is None else seed)
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
    baseline = None
    if compare:
        with report.status("baseline decoding, for comparison"):
            baseline = session.run([ids], max_new_tokens=max_new_tokens, speculative=False, **how)
    if as_json:
        value = report.answer_json(session, run, baseline, "".join(pieces))
        options = report.settings(sampling, sample_from.value, rule.value) | {"temperature": temperature}
        print(json.dumps(report.header(session, prompt=text, max_new_tokens=max_new_tokens, **options)
                         | {"kind": "generate"} | value, indent=1, ensure_ascii=False))
    else:
        report.print_answer(session, ids, run, baseline, sampling, sample_from.value)


def run(arguments: list[str]) -> int:
    """Runs the command and returns its exit code. An error prints one line on standard error."""
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
