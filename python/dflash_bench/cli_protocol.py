"""`dflash-kernels bench protocol`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from dflash_decode.cli.options import (
    BlockSize,
    Debug,
    Device,
    DrafterName,
    DraftersWeights,
    DrafterWeights,
    Dtype,
    MaxTokens,
    ModelWeights,
    Threads,
    UsageError,
    Weights,
    Where,
    check_device,
    set_threads,
    short,
)

from .options import check_files

OUR_LOOPS = ("drafter", "weights", "drafter_weights", "block_size", "dtype", "device",
             "threads")  # a server has its own


def protocol(
    context: typer.Context,
    prompts: Annotated[
        list[Path],
        typer.Option(
            help='JSON lines: {"task": ..., "id": ..., "turns": [...]}. Tasks of the '
            "model cards: math500, gsm8k, humaneval, mt_bench."
        ),
    ],
    model: Annotated[
        str | None,
        typer.Option(
            help="Target, as for generate; by default smollm2. With --base-url: a name that the server lists; by "
            "default its first."
        ),
    ] = None,
    drafter: DrafterName = "auto",
    weights: ModelWeights = Weights.model,
    drafter_weights: DrafterWeights = DraftersWeights.auto,
    base_url: Annotated[
        str | None,
        typer.Option(
            help="Measure this OpenAI-compatible server instead of our loop. OPENAI_API_KEY sets its key."
        ),
    ] = None,
    extra_body: Annotated[str | None, typer.Option(help="JSON object with more fields for the requests.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use only the first N prompts of each file.")] = None,
    concurrency: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Number of concurrent requests; by default 1 and 32. Repeatable."),
    ] = None,
    max_tokens: MaxTokens = 4096,
    block_size: BlockSize = 8,
    dtype: Dtype = "bfloat16",
    device: Where = Device.cpu,
    threads: Threads = None,
    journal: Annotated[
        Path, typer.Option(help="File of finished prompts. Repeating the command continues from it.")
    ] = Path("protocol.jsonl"),
    json_out: Annotated[Path | None, typer.Option("--json", help="Write the results to this file.")] = None,
    debug: Debug = False,
) -> None:
    """Run the protocol of the model cards: throughput and acceptance length by concurrency.

    All turns of all tasks are decoded, greedily."""
    check_files(prompts, {"--json": json_out, "--journal": journal})
    extra = read_extra(extra_body)
    if base_url is None and extra:
        raise UsageError("--extra-body needs --base-url")
    for name in OUR_LOOPS if base_url is not None else ():
        source = context.get_parameter_source(name)
        if source is not None and source.name != "DEFAULT":
            raise UsageError(f"--{name.replace('_', '-')} is for our loop; the server of --base-url has its own")
    set_threads(threads)
    check_device(device)
    from . import decode, protocol_report

    rows = [row for file in prompts for row in decode.read_prompts(file, limit)]
    if base_url is not None:
        answerer: protocol_report.Answerer = protocol_report.server(base_url, model, max_tokens, extra)
    else:
        model = "smollm2" if model is None else model
        answerer = protocol_report.our_loop(model, drafter, block_size, max_tokens, dtype, device.value,
                                            weights.value, drafter_weights.value)
    protocol_report.run(answerer, rows, list(dict.fromkeys(concurrency or (1, 32))), journal, json_out,
                        {"prompts": [file.name for file in prompts], "limit": limit})


def read_extra(text: str | None) -> dict:
    try:
        extra = json.loads(text or "{}")
        if isinstance(extra, dict):
            return extra
    except (ValueError, RecursionError):
        pass
    raise UsageError(f"--extra-body must be a JSON object; got {short(text)}")
