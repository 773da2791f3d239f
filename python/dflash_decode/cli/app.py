"""The command `dflash-kernels`: info and generate, and the commands that other packages register.

Exit codes: 0 for success, 2 for wrong arguments or a missing package, 130 after Ctrl-C, 1 for every other error.
"""

import json
import secrets
from importlib.metadata import entry_points, version
from typing import Annotated, Any

import typer

from ..choices import NONE
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
from .streams import INTERRUPTED, attempt

app = typer.Typer(name="dflash-kernels", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
                  help="DFlash speculative decoding with fused kernels.")
for command in entry_points(group="dflash_kernels.commands"):
    app.add_typer(command.load(), name=command.name)


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
    from . import info

    info.show(as_json)


@app.command()
def generate(
    prompt: Annotated[str, typer.Option(help="The user's message; '-' reads standard input.")],
    model: Model = "smollm2",
    draft: Draft = "auto",
    weights: ModelWeights = Weights.auto,
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

    if (block_size is not None or compare) and drafter_of(model, draft) == NONE:
        option = "--compare" if block_size is None else "--block-size"
        raise UsageError(f"{option} needs a drafter: --draft DIRECTORY or --draft random")
    set_threads(threads)
    check_device(device)

    from ..sampling import SamplingParams
    from ..session import Session
    from . import report

    sampling = SamplingParams(temperature, top_k, top_p, min_p, secrets.randbits(31) if seed is None else seed)
    how: dict[str, Any] = {"sampling": sampling, "sample_from": sample_from.value, "rule": rule.value}
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
    def command() -> int:
        try:
            code = app(arguments, prog_name="dflash-kernels", standalone_mode=False)
            return code if isinstance(code, int) else 0
        except typer.Abort:
            return INTERRUPTED
        except typer.Exit as done:
            return done.exit_code

    return attempt(command, "--debug" in arguments)
