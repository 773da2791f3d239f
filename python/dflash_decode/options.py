"""What the commands of `dflash-kernels` share: options, and the checks of them that need no heavy module."""

import os
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer


class UsageError(Exception):
    """A command that was written wrongly."""

    exit_code = 2


class Device(str, Enum):
    cpu = "cpu"
    cuda = "cuda"


class SampleFrom(str, Enum):
    greedy = "greedy"
    request = "request"


class Rule(str, Enum):
    token = "token"
    block = "block"


class Weights(str, Enum):
    model = "model"
    int8 = "int8"


class DraftersWeights(str, Enum):
    auto = "auto"
    int8 = "int8"
    model = "model"


class DType(str, Enum):
    bfloat16 = "bfloat16"
    float32 = "float32"
    float16 = "float16"


Model = Annotated[str, typer.Option(help="A directory with config.json and safetensors, a .gguf file, or: smollm2.")]
Draft = Annotated[str, typer.Option(help="A drafter's directory; 'auto': the one that comes with this package for the "
                                         "model, or none; 'random': random weights; 'none': plain decoding.")]
ModelWeights = Annotated[Weights, typer.Option("--weights", help="Keep the model's weights as they are, or in 8 bits: "
                                               "half of the bytes to read, and another model, whose text differs "
                                               "here and there. With a drafter or without, its text is the same.")]
DraftWeights = Annotated[DraftersWeights, typer.Option(help="What the drafter's weights are kept in: 8 bits, the "
                                                            "model's dtype, or 'auto': 8 bits on a CPU. The text is "
                                                            "the same.")]
BlockSize = Annotated[int | None, typer.Option(min=1, max=32, help="Tokens in a block; the drafter's if not given.")]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="The longest answer, in tokens.")]
Dtype = Annotated[DType, typer.Option(help="What weights and activations are kept in.")]
Where = Annotated[Device, typer.Option("--device", help="Where the model runs.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads; all cores if not given.")]
TopK = Annotated[int, typer.Option(min=0, help="Draw from the K likeliest tokens; 0: from all.")]
TopP = Annotated[float, typer.Option(min=0, max=1, help="Draw from the likeliest tokens with this share together.")]
MinP = Annotated[float, typer.Option(min=0, max=1, help="Draw from tokens with this share of the likeliest's.")]
From = Annotated[SampleFrom, typer.Option("--sample-from", help="Drafts of sampled text: the likeliest ('greedy': the "
                                          "text is plain sampling's, for each seed), or drawn as the text is "
                                          "('request': its law is).")]
By = Annotated[Rule, typer.Option("--rule", help="How drawn drafts are accepted: one by one, or as a block.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def check_files(prompts: list[Path], written: dict[str, Path | None]) -> None:
    for file in prompts:
        if not file.is_file():
            raise UsageError(f"--prompts must be a file; got {str(file)!r}, which "
                             f"{'is a directory' if file.is_dir() else 'does not exist'}")
    check_written(written)


def check_written(written: dict[str, Path | None]) -> None:
    for option, file in written.items():
        if file is not None and not os.access(file.absolute().parent, os.W_OK):
            raise UsageError(f"{option} must be a file in a directory that can be written; got {str(file)!r}")


def check_device(device: Device) -> None:
    import torch

    if device is Device.cuda and not torch.cuda.is_available():
        raise UsageError(f"--device cuda needs a GPU that torch can use; torch {torch.__version__} finds none")


def set_threads(threads: int | None) -> None:
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
