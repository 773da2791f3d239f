"""The `make` commands that repeat what results were recorded with."""

import re

# A result keeps the command that it was recorded with, under the module's name of that day.
PYTHON = r"((?:\w+=\S+ )*)python "
RECORDED = (
    (re.compile(PYTHON + r"(?:-m bench\.peers|bench/peers/run\.py) --prompts ((?:\S+\.jsonl )+)(.*)"), "peers"),
    (re.compile(PYTHON + r"(?:-m bench\.ops|bench/run\.py) ()(.*)"), "bench"))


def command_of(recorded: str) -> str:
    for pattern, target in RECORDED:
        if match := pattern.fullmatch(recorded):
            prompts = f' PROMPTS="{match[2].strip()}"' if match[2] else ""
            return f'{match[1]}make {target}{prompts} ARGS="{match[3]}"'
    return recorded


def evaluate_command(r: dict) -> str:
    limit = f"--limit {r['limit']} " if r["limit"] else ""
    weights = "--weights int8 " if r.get("weights") == "int8" else ""
    options = f"{weights}{limit}--max-tokens {r['max_tokens']}"
    if r.get("adapts") is False:
        files = " ".join(f"--prompts {file}" for file in r["prompts"])
        return f"dflash-kernels bench decode --block-size {r['block_size']} {options} {files}"
    return f'make evaluate PROMPTS="{" ".join(r["prompts"])}" ARGS="{options}"'
