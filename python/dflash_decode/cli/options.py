"""What the commands of `dflash-kernels` share: options, and the checks of them that need no heavy module."""

import os
import sys
from collections.abc import Callable
from enum import Enum
from typing import Annotated

import typer

from ..choices import DraftersWeights, Rule, SampleFrom, Weights
from ..dtypes import dtype_name
from .streams import UsageError, reason


class Device(str, Enum):
    cpu = "cpu"
    cuda = "cuda"


def read_dtype(text: str) -> str:
    if (name := dtype_name(text)) is None:
        raise typer.BadParameter(f"{short(text)} is not one of 'auto', 'bfloat16', 'float16', 'float32'.")
    return name


def _finite(low: float, high: float) -> Callable[[str | float], float]:
    """What reads an option's number: the library's own range would take nan for a value out of it."""
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
Model = Annotated[str, typer.Option(help="A directory with config.json and safetensors, a .gguf file, or: smollm2.")]
Draft = Annotated[str, typer.Option(help="A drafter's directory; 'auto': the one that comes with this package for the "
                                         "model, or none; 'random': random weights; 'none': baseline decoding.")]
ModelWeights = Annotated[Weights, typer.Option("--weights", help="Keep the model's weights as they are, or in 8 bits: "
                                               "half of the bytes to read, and another model, whose text differs "
                                               "here and there. With a drafter or without, its text is the same.")]
DraftWeights = Annotated[DraftersWeights, typer.Option(help="What the drafter's weights are kept in: 8 bits, the "
                                                            "model's dtype, or 'auto': 8 bits on a CPU. The text is "
                                                            "the same.")]
BlockSize = Annotated[int | None, typer.Option(min=1, max=32, help="Tokens in a block; the drafter's if not given.")]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="The longest answer, in tokens.")]
Dtype = Annotated[str, typer.Option(parser=read_dtype, metavar="[auto|bfloat16|float16|float32]",
                                    help="What weights and activations are kept in; 'auto': what the model's "
                                         "config.json says.")]
Where = Annotated[Device, typer.Option("--device", help="Where the model runs.")]
Threads = Annotated[int | None, typer.Option(min=1, max=MOST_THREADS, help="CPU threads; all cores if not given.")]
_TEMPERATURE = {"parser": _finite(0, MOST_TEMPERATURE), "metavar": "FLOAT"}
_SHARE = {"parser": _finite(0, 1), "metavar": "FLOAT"}
Temperature = Annotated[float, typer.Option(**_TEMPERATURE, help="0: greedy.")]
Temperatures = Annotated[list[float], typer.Option("--temperature", **_TEMPERATURE,
                                                   help="0: greedy; may be given several times.")]
Seed = Annotated[int | None, typer.Option(min=0, max=MOST_SEED, help="The same seed, the same text; a fresh one, which "
                                                                     "is printed, if not given.")]
FirstSeed = Annotated[int, typer.Option("--seed", min=0, max=MOST_SEED, help="The seed of each task's first prompt; "
                                                                             "the next has one more.")]
TopK = Annotated[
    int, typer.Option(min=-1, max=2**31 - 1, help="Draw from the K most likely tokens; 0 or -1: from all.")
]
TopP = Annotated[float, typer.Option(**_SHARE, help="Draw from the most likely tokens with this share together.")]
MinP = Annotated[float, typer.Option(**_SHARE, help="Draw from tokens with this share of the most likely token's.")]
From = Annotated[
    SampleFrom,
    typer.Option(
        "--sample-from",
        help="Drafts of sampled text: the most likely ('greedy': the "
        "text is baseline sampling's, for each seed), or drawn as the text is "
        "('request': its distribution is).",
    ),
]
By = Annotated[Rule, typer.Option("--rule", help="How drawn drafts are accepted: one by one, or as a block.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def read_prompt(text: str) -> str:
    """The prompt, from standard input where it is '-'."""
    if text == "-":
        if sys.stdin is None:
            raise UsageError("--prompt - reads standard input, which is closed")
        try:
            text = sys.stdin.read()
        except (OSError, ValueError) as error:
            raise UsageError(f"--prompt - must be text on standard input; got {reason(error)}") from None
    if not text:
        raise UsageError("--prompt must not be empty")
    if any("\ud800" <= character <= "\udfff" for character in text):  # Python's sign for bytes that are not text
        raise UsageError(f"--prompt must be text in UTF-8; got {short(text)}")
    return text


def check_device(device: Device) -> None:
    import torch

    if device is Device.cuda and not torch.cuda.is_available():
        raise UsageError(f"--device cuda needs a GPU that torch can use; torch {torch.__version__} finds none")


def set_threads(threads: int | None) -> None:
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
