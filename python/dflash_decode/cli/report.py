"""Output of the command line: text for people, JSON for programs."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape

from dflash_kernels import build_info

from .. import lossless
from ..choices import RANDOM, SampleFrom
from ..sampling import SamplingParams
from ..session import Run, Session

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)
RANDOM_NOTICE = ("the drafter's weights are random: its guesses are worthless, so the acceptance length is 1 and "
                 "decoding is slower than baseline; the output is the same")
DRAWN_NOTICE = (
    "drafts are sampled: outputs follow the distribution of baseline sampling, but can differ for the same seed"
)
_BAR = 32


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
    if session.draft == RANDOM:
        notice(RANDOM_NOTICE)


def write(piece: str) -> None:
    """Prints one piece of the answer and flushes it."""
    sys.stdout.write(piece)
    sys.stdout.flush()


def answer_json(session: Session, run: Run, baseline: Run | None, text: str) -> dict:
    answer = run.answers[0]
    value = {
        "text": text, "tokens": answer.tokens, "finish": answer.finish, "num_tokens": run.tokens,
        "seconds": round(run.seconds, 4), "tokens_per_s": round(run.tokens_per_s, 2),
        "acceptance_length": round(run.acceptance_length, 4),
        "acceptance_histogram": run.histogram(session.block_size),
        "verified_rows": round(run.verified_rows, 4),
        "width_histogram": [run.widths.count(n) for n in range(1, session.block_size + 1)],
    }
    if baseline:
        at = lossless.first_index(answer.tokens, baseline.answers[0].tokens)
        value |= {"baseline_tokens_per_s": round(baseline.tokens_per_s, 2),
                  "speedup": round(run.tokens_per_s / baseline.tokens_per_s, 4),
                  "identical_to_baseline": at is None, "first_difference": at}
    return value


def print_answer(session: Session, prompt: list[int], run: Run, baseline: Run | None, sampling: SamplingParams,
                 sample_from: str) -> None:
    """Prints the figures below a streamed answer."""
    answer, drawn = run.answers[0], sampling.temperature > 0
    out.print()
    end = "end of text" if answer.finish == "stop" else "length limit reached"
    line("tokens", f"{run.tokens}, in {run.seconds:.2f} s ({end})")
    line("tokens/s", f"{run.tokens_per_s:.1f}")
    if drawn:
        line("sampling", how(sampling) + f", seed {answer.seed}")
    if session.drafter:
        line("drafter", "random weights (untrained)" if session.draft == RANDOM else escape(Path(session.draft).name))
        line("acceptance length", f"{run.acceptance_length:.2f} of {session.block_size}, {len(run.steps)} steps")
        counts = run.histogram(session.block_size)
        for n, count in enumerate(counts, 1):
            bar = "█" * round(_BAR * count / max(max(counts), 1)) or ("▏" if count else "")
            out.print(f"  {n:>3} [cyan]{bar}[/cyan] {count}")
        counted = ", ".join(f"{n} in {count}" for n in range(1, session.block_size + 1)
                            if (count := run.widths.count(n)))
        line("verified", f"{run.verified_rows:.2f} tokens a step ({counted} steps)")
    if baseline:
        line("baseline tokens/s", f"{baseline.tokens_per_s:.1f}")
        line("speedup", f"{run.tokens_per_s / baseline.tokens_per_s:.2f}")
        same = _identical(session, prompt, answer, baseline.answers[0], drawn)
        if drawn and sample_from == SampleFrom.request and not same.startswith("[green]"):
            same += " (drafts were sampled: the distribution is the same, the output can differ)"
        line(f"identical to baseline {'sampling of this seed' if drawn else 'decoding'}", same)


def how(sampling: SamplingParams) -> str:
    """The sampling settings that are not off."""
    off = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}
    return ", ".join([f"temperature {sampling.temperature:g}",
                      *(f"{name.replace('_', '-')} {value:g}" for name, none in off.items()
                        if (value := getattr(sampling, name)) != none)])


def line(name: str, value: str) -> None:
    out.print(f"[bold]{name}:[/bold] {value}", markup=True)


def _identical(session, prompt, answer, baseline, drawn) -> str:
    at = lossless.first_index(answer.tokens, baseline.tokens)
    if at is None:
        return "[green]yes[/green]"

    def show(tokens):
        if at >= len(tokens):
            return "the end"
        return f"{tokens[at]} {session.tokenizer.decode([tokens[at]], skip_special_tokens=False)!r}".replace("[", "\\[")

    found = None if drawn else lossless.first_difference(session.target, prompt, baseline.tokens, answer.tokens)
    margin = f" (logit margin {found.margin:.3g})" if found and found.margin is not None else ""
    return f"[red]no[/red]: token {at + 1} is {show(answer.tokens)}, baseline has {show(baseline.tokens)}{margin}"


def settings(sampling: SamplingParams, sample_from: str, rule: str) -> dict:
    """The sampling settings that results record, without the temperature."""
    return {"top_k": sampling.top_k, "top_p": sampling.top_p, "min_p": sampling.min_p, "seed": sampling.seed,
            "sample_from": sample_from, "rule": rule}


def header(session: Session, **options) -> dict:
    """The machine, versions and settings of a measurement."""
    info = build_info()
    return {
        "kind": "decode", "model": session.model, "draft": Path(session.draft).name, "block_size": session.block_size,
        "weights": session.weights, "draft_int8": session.drafter is not None and session.drafter.int8,
        "adapts": session.adapts and options.get("sample_from") != SampleFrom.request,  # drawn drafts fill whole blocks
        "dtype": str(session.target.dtype).removeprefix("torch."), **options,
        "cpu": info["cpu"], "threads": torch.get_num_threads(), "isa": info["isa"],
        "versions": {"dflash-kernels": info["version"], "torch": info["torch"], "python": info["python"]},
        "platform": info["platform"],
    }
