"""The `make` commands that repeat what results were recorded with."""

import re

from bench import PROMPTS, ROOT

# A result keeps the command that it was recorded with, under the module's name of that day.
PYTHON = r"((?:\w+=\S+ )*)python "
RECORDED = (
    (re.compile(PYTHON + r"(?:-m bench\.peers|bench/peers/run\.py) --prompts ((?:\S+\.jsonl )+)(.*)"), "peers"),
    (re.compile(PYTHON + r"(?:-m bench\.ops|bench/run\.py) ()(.*)"), "bench"))


def command_of(recorded: str) -> str:
    for pattern, target in RECORDED:
        if match := pattern.fullmatch(recorded):
            return f'{match[1]}make {target}{_prompts(match[2].split())} ARGS="{match[3]}"'
    return recorded


def _prompts(names: list[str]) -> str:
    """`make` takes all files of bench/prompts, if it is given none."""
    if not names or set(names) == {file.name for file in PROMPTS.glob("*.jsonl")}:
        return ""
    return f' PROMPTS="{" ".join(map(_path, names))}"'


def _path(name: str) -> str:
    """A result has the file's name alone."""
    file = PROMPTS / name
    return str(file.relative_to(ROOT)) if file.is_file() else name


def evaluate_command(r: dict) -> str:
    limit = f"--limit {r['limit']} " if r["limit"] else ""
    weights = "--weights int8 " if r.get("weights") == "int8" else ""
    options = f"{weights}{limit}--max-tokens {r['max_tokens']}"
    if r.get("adapts") is False:
        files = " ".join(f"--prompts {_path(file)}" for file in r["prompts"])
        return f"dflash-kernels bench decode --block-size {r['block_size']} {options} {files}"
    return f'make evaluate{_prompts(r["prompts"])} ARGS="{options}"'
