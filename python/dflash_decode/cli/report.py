"""Output of the command line: text for people, JSON for programs."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape

from dflash_kernels import build_info

from .. import lossless
from ..choices import RANDOM, SampleFrom
from ..llm.api import LLM
from ..llm.outputs import Completion
from ..llm.params import GenerationParams
from ..sampling import SamplingParams
from ..session import Session

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)
RANDOM_NOTICE = ("the drafter's weights are random: its drafts are worthless, and decoding can be slower than "
                 "baseline; the output is the same")
DRAWN_NOTICE = (
    "drafts are sampled: outputs follow the distribution of baseline sampling, but can differ for the same seed"
)
_BAR = 32
SETTINGS = ("temperature", "top_k", "top_p", "min_p", "seed")  # that a result records


@contextmanager
def status(text: str) -> Iterator[None]:
    """Shows on a terminal's stderr the work in progress."""
    if not err.is_terminal:
        yield
        return
    with err.status(f"[dim]{escape(text)} ...[/dim]"):
        yield


def notice(text: str) -> None:
    err.print(f"[yellow]note:[/yellow] {escape(text)}")


def start_text(session: Session) -> None:
    if not session.target.graph_safe:
        notice("this model runs on transformers' layers, whose results can change in the last bits with the number of "
               "rows: a near tie can make the output differ from baseline decoding's")
    if session.drafter_name == RANDOM:
        notice(RANDOM_NOTICE)


def write(piece: str) -> None:
    """Prints one piece of the answer and flushes it."""
    sys.stdout.write(piece)
    sys.stdout.flush()


def warm_up(llm: LLM, params: GenerationParams) -> None:
    """Does before the clock runs what happens once on a GPU: it compiles and records."""
    if llm.session.target.device.type == "cuda":
        with status("compiling and recording"):
            llm.warm_up(None, params)


def answer_json(session: Session, found: Completion, baseline: Completion | None) -> dict:
    value = {
        "text": found.text, "tokens": found.token_ids, "finish": found.finish_reason,
        "num_tokens": len(found.token_ids), "time_to_first_token": round(found.time_to_first_token, 4),
        "seconds": round(found.seconds, 4), "tokens_per_s": round(found.tokens_per_s, 2),
        "acceptance_length": round(found.acceptance_length, 4),
        "acceptance_histogram": counts(found.steps, session.block_size),
        "verified_rows": round(found.verified_rows, 4), "width_histogram": counts(found.widths, session.block_size),
    }
    if baseline:
        at = lossless.first_index(found.token_ids, baseline.token_ids)
        value |= {"baseline_tokens_per_s": round(baseline.tokens_per_s, 2),
                  "speedup": round(found.tokens_per_s / baseline.tokens_per_s, 4),
                  "identical_to_baseline": at is None, "first_difference": at}
    return value


def counts(values: Sequence[int], block: int) -> list[int]:
    """How many of the values are 1, 2, ..., up to the block size or the largest of them."""
    return [values.count(n) for n in range(1, max([block, *values]) + 1)]


def figures(found: Completion) -> None:
    """One line about an answer in a conversation."""
    out.print(f"[dim]{len(found.token_ids)} tokens, {found.tokens_per_s:.1f} tokens/s, acceptance length "
              f"{found.acceptance_length:.2f}[/dim]")


def print_answer(session: Session, found: Completion, baseline: Completion | None, params: GenerationParams,
                 sample_from: str) -> None:
    """Prints the figures below a streamed answer."""
    drawn = found.seed is not None
    out.print()
    end = "end of text" if found.finish_reason == "stop" else "length limit reached"
    line("tokens", f"{len(found.token_ids)}, in {found.seconds:.2f} s ({end})")
    line("tokens/s", f"{found.tokens_per_s:.1f}")
    if drawn:
        line("sampling", how(params) + f", seed {found.seed}")
    if session.drafter:
        named = session.drafter_name
        line("drafter", "random weights (untrained)" if named == RANDOM else escape(Path(named).name))
        line("acceptance length", f"{found.acceptance_length:.2f}, {len(found.steps)} steps")
        committed = counts(found.steps, session.block_size)
        for n, count in enumerate(committed, 1):
            bar = "█" * round(_BAR * count / max(max(committed), 1)) or ("▏" if count else "")
            out.print(f"  {n:>3} [cyan]{bar}[/cyan] {count}")
        counted = ", ".join(f"{n} in {count}" for n, count in enumerate(counts(found.widths, session.block_size), 1)
                            if count)
        line("verified", f"{found.verified_rows:.2f} tokens a step ({counted} steps)")
    if baseline:
        line("baseline tokens/s", f"{baseline.tokens_per_s:.1f}")
        line("speedup", f"{found.tokens_per_s / baseline.tokens_per_s:.2f}")
        same = _identical(session, found, baseline, drawn)
        if drawn and sample_from == SampleFrom.request and not same.startswith("[green]"):
            same += " (drafts were sampled: the distribution is the same, the output can differ)"
        line(f"identical to baseline {'sampling of this seed' if drawn else 'decoding'}", same)


def how(sampling: SamplingParams | GenerationParams) -> str:
    """The sampling settings that are not off."""
    off = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}
    return ", ".join([f"temperature {sampling.temperature:g}",
                      *(f"{name.replace('_', '-')} {value:g}" for name, none in off.items()
                        if (value := getattr(sampling, name)) != none)])


def line(name: str, value: str) -> None:
    out.print(f"[bold]{name}:[/bold] {value}", markup=True)


def _identical(session: Session, found: Completion, baseline: Completion, drawn: bool) -> str:
    at = lossless.first_index(found.token_ids, baseline.token_ids)
    if at is None:
        return "[green]yes[/green]"

    def show(tokens):
        if at >= len(tokens):
            return "the end"
        return f"{tokens[at]} {session.tokenizer.decode([tokens[at]], skip_special_tokens=False)!r}".replace("[", "\\[")

    differs = None if drawn else lossless.first_difference(session.target, found.prompt_token_ids, baseline.token_ids,
                                                           found.token_ids)
    margin = f" (logit margin {differs.margin:.3g})" if differs and differs.margin is not None else ""
    return (f"[red]no[/red]: token {at + 1} is {show(found.token_ids)}, baseline has {show(baseline.token_ids)}"
            f"{margin}")


def settings(sampling: SamplingParams, sample_from: str, rule: str) -> dict:
    """The sampling settings that results record, without the temperature."""
    return {"top_k": sampling.top_k, "top_p": sampling.top_p, "min_p": sampling.min_p, "seed": sampling.seed,
            "sample_from": sample_from, "rule": rule}


def header(session: Session, **options) -> dict:
    """The machine, versions and settings of a measurement."""
    info = build_info()
    return {
        "kind": "decode", "model": session.model, "drafter": Path(session.drafter_name).name,
        "block_size": session.block_size,
        "weights": session.weights, "drafter_int8": session.drafter is not None and session.drafter.int8,
        "adapts": session.adapts and options.get("sample_from") != SampleFrom.request,  # drawn drafts fill whole blocks
        "dtype": str(session.target.dtype).removeprefix("torch."), **options,
        "cpu": info["cpu"], "threads": torch.get_num_threads(), "isa": info["isa"],
        "versions": {"dflash-kernels": info["version"], "torch": info["torch"], "python": info["python"]},
        "platform": info["platform"],
    }
