"""The command `dflash-kernels`: info, generate and chat, and the commands that other packages register.

Exit codes: 0 for success, 2 for wrong arguments or a missing package, 130 after Ctrl-C, 1 for every other error.
"""

import secrets
from importlib.metadata import entry_points, version
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..choices import NONE
from .conversation import read_conversation, read_names, system_message
from .options import (
    BlockSize,
    By,
    Debug,
    Device,
    DrafterName,
    DraftersWeights,
    DrafterWeights,
    Dtype,
    File,
    From,
    MaxTokens,
    Messages,
    MinP,
    Model,
    ModelWeights,
    Native,
    Prompt,
    Rule,
    SampleFrom,
    Seed,
    Stop,
    System,
    Temperature,
    TemplateKwargs,
    Threads,
    TopK,
    TopP,
    UsageError,
    Weights,
    Where,
    check_device,
    check_stops,
    set_threads,
)
from .streams import INTERRUPTED, attempt

if TYPE_CHECKING:
    from ..llm.api import LLM

app = typer.Typer(name="dflash-kernels", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
                  help="DFlash speculative decoding with fused kernels.")



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
    prompt: Prompt = None,
    file: File = None,
    messages: Messages = None,
    system: System = None,
    model: Model = "smollm2",
    drafter: DrafterName = "auto",
    weights: ModelWeights = Weights.auto,
    drafter_weights: DrafterWeights = DraftersWeights.auto,
    native: Native = False,
    block_size: BlockSize = None,
    max_tokens: MaxTokens = 256,
    stop: Stop = None,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    seed: Seed = None,
    sample_from: From = SampleFrom.greedy,
    rule: By = Rule.token,
    template_kwargs: TemplateKwargs = None,
    dtype: Dtype = "bfloat16",
    device: Where = Device.cpu,
    threads: Threads = None,
    compare: Annotated[bool, typer.Option("--compare", help="Also run baseline decoding, and compare.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
    debug: Debug = False,
) -> None:
    """Answer one prompt, streamed, and report the speed.

    Decoding is greedy unless an option says otherwise, whatever the model's generation_config.json says.
    """
    conversation, names = read_conversation(prompt, file, messages, system), read_names(template_kwargs)
    stops = check_stops(stop)
    llm = _load(model, drafter, block_size, compare, threads, device, dtype=dtype, weights=weights.value,
                drafter_weights=drafter_weights.value, native=native, sample_from=sample_from.value, rule=rule.value)
    from ..llm.params import GenerationParams
    from . import generate as command

    params = GenerationParams(max_tokens, temperature, top_k, top_p, min_p,
                              secrets.randbits(31) if seed is None else seed, stops, repetition_penalty=1.0)
    command.answer(llm, conversation, params, names, compare=compare, as_json=as_json, sample_from=sample_from.value,
                   rule=rule.value)


@app.command()
def chat(
    system: System = None,
    model: Model = "smollm2",
    drafter: DrafterName = "auto",
    weights: ModelWeights = Weights.auto,
    drafter_weights: DrafterWeights = DraftersWeights.auto,
    native: Native = False,
    block_size: BlockSize = None,
    max_tokens: MaxTokens = 1024,
    stop: Stop = None,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    seed: Seed = None,
    template_kwargs: TemplateKwargs = None,
    dtype: Dtype = "bfloat16",
    device: Where = Device.cpu,
    threads: Threads = None,
    as_json: Annotated[bool, typer.Option("--json", help="Read a JSON text or message from each line, and print a "
                                                         "JSON object for each answer.")] = False,
    debug: Debug = False,
) -> None:
    """Talk with the model. Each line is a message, and the answers stay in the conversation.

    /clear forgets the conversation, /exit ends it, Ctrl-C stops an answer. With --json, null forgets it.
    """
    names, stops = read_names(template_kwargs), check_stops(stop)
    first = None if system is None else system_message(system)
    llm = _load(model, drafter, block_size, False, threads, device, dtype=dtype, weights=weights.value,
                drafter_weights=drafter_weights.value, native=native)
    from ..llm.params import GenerationParams
    from .chat import Chat, talk, talk_json

    params = GenerationParams(max_tokens, temperature, top_k, top_p, min_p, seed, stops, repetition_penalty=1.0)
    (talk_json if as_json else talk)(Chat(llm, first, params, names))


def _load(model: str, drafter: str, block_size: int | None, compare: bool, threads: int | None, device: Device,
          **options: Any) -> "LLM":
    from ..checkpoint import drafter_of
    from ..checkpoint.find import without_one

    if (block_size is not None or compare) and drafter_of(model, drafter) == NONE:
        option = "--compare" if block_size is None else "--block-size"
        raise UsageError(f"{option} needs a drafter: {without_one(model, drafter)}")
    set_threads(threads)
    check_device(device)
    from ..llm.api import LLM
    from . import report

    return LLM(model, drafter, block_size=block_size, device=device.value, max_batch=1, status=report.status, **options)


# What other packages register: a function is a command, an app of typer's a group of them.
for point in entry_points(group="dflash_kernels.commands"):
    found = point.load()
    if isinstance(found, typer.Typer):
        app.add_typer(found, name=point.name)
    else:
        app.command(point.name)(found)


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
