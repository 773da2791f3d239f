"""Options shared by the commands of `dflash-kernels`, and the checks of them that need no heavy module."""

import os
from collections.abc import Callable
from enum import Enum
from typing import Annotated

import typer

from ..choices import DraftersWeights, Rule, SampleFrom, Weights
from ..dtypes import dtype_name
from .streams import UsageError


class Device(str, Enum):
    cpu = "cpu"
    cuda = "cuda"


def read_dtype(text: str) -> str:
    if (name := dtype_name(text)) is None:
        raise typer.BadParameter(f"{short(text)} is not one of 'auto', 'bfloat16', 'float16', 'float32'.")
    return name


def _finite(low: float, high: float) -> Callable[[str | float], float]:
    """A parser for finite numbers from low to high; typer's own range check accepts nan."""
    def number(text: str | float) -> float:
        try:
            if low <= (value := float(text)) <= high:
                return value
        except ValueError:
            pass
        raise typer.BadParameter(f"{short(text)} is not a finite number from {low:g} to {high:g}.")
    return number


def short(value: object) -> str:
    """The value as an error shows it."""
    text = repr(str(value))
    return text if len(text) <= 80 else f"{text[:38]}...{text[-38:]}"


MOST_THREADS = max(os.cpu_count() or 1, 64)  # more are no faster, and some thousands end the process without a word
MOST_TEMPERATURE, MOST_SEED = 3.4e38, 2**63 - 1  # float32 and int64 have room for no more
Model = Annotated[str, typer.Option(help="Target: a directory with config.json and safetensors, a .gguf file, the "
                                         "id of a model that `hf download` has fetched, or smollm2.")]
DrafterName = Annotated[str, typer.Option(help="Drafter: its directory, file or id, 'auto' (the installed one for the "
                                               "target, or none), 'random' (random weights) or 'none' (baseline "
                                               "decoding).")]
ModelWeights = Annotated[Weights, typer.Option("--weights", help="Target weights: in the target's dtype; in 8 bits, "
                                               "which halve the bytes read; or in a GGUF file's own blocks, rounding "
                                               "what is multiplied with them to int8 ('file', and 'auto' on a CPU) or "
                                               "not ('exact': the output of 'model'). With and without a drafter the "
                                               "output is identical.")]
DrafterWeights = Annotated[DraftersWeights, typer.Option(help="Drafter weights: 8 bits, the target's dtype, or "
                                                              "'auto' (8 bits on a CPU). The output does not "
                                                              "change.")]
Native = Annotated[bool, typer.Option("--native", help="An error, not slower layers of transformers', where ours "
                                                         "lack what the target's config asks for.")]
Prompt = Annotated[str | None, typer.Option(help="The user's message; '-' reads standard input.")]
File = Annotated[str | None, typer.Option("--file", metavar="FILE", help="A file whose text is the user's message.")]
Messages = Annotated[str | None, typer.Option(metavar="FILE|JSON", help="A conversation to continue: a list of "
                                              '{"role": ..., "content": ...} as JSON, or a file of it.')]
System = Annotated[str | None, typer.Option(help="The system message, before the others.")]
Stop = Annotated[list[str] | None, typer.Option("--stop", help="The answer ends before this text. Repeatable.")]
TemplateKwargs = Annotated[str | None, typer.Option(metavar="JSON", help="Names for the model's chat template, as a "
                                                    'JSON object: \'{"enable_thinking": false}\'.')]
BlockSize = Annotated[int | None, typer.Option(min=1, max=32, help="Tokens of every block; by default what "
                                                                   "is worth its time, up to the drafter's.")]
MaxTokens = Annotated[int, typer.Option(min=1, help="Maximum length of an answer, in tokens.")]
Dtype = Annotated[str, typer.Option(parser=read_dtype, metavar="[auto|bfloat16|float16|float32]",
                                    help="Dtype of weights and activations; 'auto' follows the target's "
                                         "config.json.")]
Where = Annotated[Device, typer.Option("--device", help="Device that runs target and drafter.")]
Threads = Annotated[int | None, typer.Option(min=1, max=MOST_THREADS, help="CPU threads; by default one per core.")]
_TEMPERATURE = {"parser": _finite(0, MOST_TEMPERATURE), "metavar": "FLOAT"}
_SHARE = {"parser": _finite(0, 1), "metavar": "FLOAT"}
Temperature = Annotated[float, typer.Option(**_TEMPERATURE, help="Sampling temperature; 0 is greedy.")]
Temperatures = Annotated[list[float], typer.Option("--temperature", **_TEMPERATURE,
                                                   help="Sampling temperature; 0 is greedy. Repeatable.")]
Seed = Annotated[int | None, typer.Option(min=0, max=MOST_SEED, help="Sampling seed. The same seed gives the same "
                                                                     "output; by default a fresh one, which is "
                                                                     "printed.")]
FirstSeed = Annotated[int, typer.Option("--seed", min=0, max=MOST_SEED, help="Seed of each task's first prompt; each "
                                                                             "further prompt adds one.")]
TopK = Annotated[
    int, typer.Option(min=-1, max=2**31 - 1, help="Sample from the K most likely tokens; 0 or -1: from all.")
]
TopP = Annotated[float, typer.Option(**_SHARE, help="Sample from the most likely tokens that together have "
                                               "probability P; 1: from all, 0: only the most likely.")]
MinP = Annotated[float, typer.Option(**_SHARE, help="Sample from tokens at least P times as probable as the most "
                                               "likely one.")]
From = Annotated[
    SampleFrom,
    typer.Option(
        "--sample-from",
        help="How drafts are chosen when sampling. 'greedy': most likely tokens; each seed gives the output of "
        "baseline sampling. 'request': sampled like the output; the distribution is that of baseline sampling.",
    ),
]
By = Annotated[Rule, typer.Option("--rule", help="Acceptance of sampled drafts: token by token, or as a block.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def check_device(device: Device) -> None:
    import torch

    if device is Device.cuda and not torch.cuda.is_available():
        raise UsageError(f"--device cuda needs a GPU that torch can use; torch {torch.__version__} finds none")


def check_stops(stops: list[str] | None) -> tuple[str, ...]:
    if not all(stops or ()):
        raise UsageError("--stop must not be empty")
    return tuple(stops or ())


def set_threads(threads: int | None) -> None:
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
