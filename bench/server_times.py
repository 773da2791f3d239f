"""Time to first token and tokens/s of servers that speak OpenAI's API, as their clients see them.

    python -m bench.server_times PROMPTS.jsonl... [--llama LLAMA-SERVER] [--limit N] [--concurrency N...]
                                 [--max-tokens N] [--json FILE]
    python -m bench.server_times PROMPTS.jsonl... --base-url URL    # one that runs; nothing is written

Servers are started in turn, for SmolLM2's GGUF file: llama-server if it is named, ours with the drafter, and ours
without. Greedy chats, streamed; one round of all prompts goes before the one that is measured, and nothing of it is
reused. Then the first eight prompts are the turns of one conversation: once every turn is read as if it were new, and
once a server may start from what it has read and written before, after such a conversation under another salt.
"""

import argparse
import asyncio
import json
import secrets
import sys
import time
from pathlib import Path
from statistics import median
from typing import NamedTuple

from openai import AsyncOpenAI
from openai.types import CompletionUsage

from bench.case import device_name, results_folder
from bench.servers import free_port, serving
from dflash_bench.decode import Prompt, read_prompts
from dflash_bench.results import commit, output, write_json
from dflash_decode.checkpoint import find_model
from dflash_kernels import build_info

MODEL, CONTEXT, TURNS = "smollm2", 2048, 8


def reusing(salt: str | None) -> dict:
    """Fields of a request that reuses nothing, for llama-server and ours; or, with a salt, what was asked with it."""
    return {"cache_prompt": salt is not None, "cache_salt": salt or secrets.token_hex(8)}


class Timed(NamedTuple):
    first: float  # seconds to the first text
    text: str
    usage: CompletionUsage


async def timed(client: AsyncOpenAI, model: str, messages: list[dict], max_tokens: int,
                salt: str | None = None) -> Timed:
    """salt: as for `reusing`."""
    began, first, pieces, usage = time.perf_counter(), 0.0, [], None
    stream = await client.chat.completions.create(
        model=model, messages=messages, max_tokens=max_tokens, temperature=0.0, stream=True,
        stream_options={"include_usage": True}, extra_body=reusing(salt))
    async for chunk in stream:
        if chunk.choices and chunk.choices[0].delta.content:
            first = first or time.perf_counter() - began
            pieces.append(chunk.choices[0].delta.content)
        usage = chunk.usage or usage
    return Timed(first, "".join(pieces), usage)


def said(text: str, role: str = "user") -> dict:
    return {"role": role, "content": text}


async def conversation(url: str, prompts: list[Prompt], max_tokens: int, salt: str | None = None) -> list[dict]:
    """Of each turn, the tokens of its prompt and the seconds to its first token."""
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="EMPTY", max_retries=2, timeout=600) as client:
        model, messages, turns = (await client.models.list()).data[0].id, [], []
        for prompt in prompts:
            messages.append(said(prompt.turns[0]))
            found = await timed(client, model, messages, max_tokens, salt)
            messages.append(said(found.text, "assistant"))
            turns.append({"prompt_tokens": found.usage.prompt_tokens, "first_token_s": round(found.first, 4)})
    return turns


async def measured(url: str, prompts: list[Prompt], concurrency: int, max_tokens: int) -> dict:
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="EMPTY", max_retries=2, timeout=600) as client:
        model, room = (await client.models.list()).data[0].id, asyncio.Semaphore(concurrency)

        async def one(prompt: Prompt) -> Timed:
            async with room:
                return await timed(client, model, [said(prompt.turns[0])], max_tokens)

        await asyncio.gather(*map(one, prompts))
        began = time.perf_counter()
        found = await asyncio.gather(*map(one, prompts))
        seconds = time.perf_counter() - began
    firsts, tokens = [each.first for each in found], sum(each.usage.completion_tokens for each in found)
    return {"concurrency": concurrency, "prompts": len(prompts), "tokens": tokens,
            "tokens_per_s": round(tokens / seconds, 1), "first_token_median_s": round(median(firsts), 4),
            "first_token_most_s": round(max(firsts), 4)}


def commands(llama: Path | None, batch: int, threads: int, port: int) -> dict[str, list[str]]:
    """The servers by the names that the table has."""
    ours = [sys.executable, "-m", "dflash_decode.cli", "serve", "--model", MODEL, "--port", f"{port}", "--max-batch",
            f"{batch}", "--max-context", f"{CONTEXT}", "--threads", f"{threads}"]
    theirs = [f"{llama}", "--model", f"{find_model(MODEL)}", "--ctx-size", f"{CONTEXT * batch}", "--parallel",
              f"{batch}", "--threads", f"{threads}", "--threads-batch", f"{threads}", "--port", f"{port}", "--offline"]
    return ({"llama-server": theirs} if llama else {}) | {
        "dflash-kernels serve": ours, "dflash-kernels serve --drafter none": [*ours, "--drafter", "none"]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompts", nargs="+", type=Path)
    parser.add_argument("--base-url")
    parser.add_argument("--llama", type=Path, metavar="LLAMA-SERVER")
    parser.add_argument("--limit", type=int, default=8)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--json", type=output, help="another file")
    given = parser.parse_args()
    prompts = [row for file in given.prompts for row in read_prompts(file, given.limit)]

    def rows(name: str, url: str) -> list[dict]:
        found = [{"server": name} | asyncio.run(measured(url, prompts, n, given.max_tokens)) for n in given.concurrency]
        for row in found:
            print(json.dumps(row), flush=True)
        asyncio.run(conversation(url, prompts[:TURNS], given.max_tokens, "of the round before"))
        for salt in (None, "of the round that counts"):
            turns.append({"server": name, "fresh": salt is None, "turns": asyncio.run(
                conversation(url, prompts[:TURNS], given.max_tokens, salt))})
            print(json.dumps(turns[-1]), flush=True)
        return found

    turns: list[dict] = []
    if given.base_url:
        rows(given.base_url, given.base_url)
        return 0
    info, found, port = build_info(), [], free_port()
    for name, command in commands(given.llama, max(given.concurrency), info["threads"], port).items():
        with serving(command, port) as (_, url):
            found += rows(name, url)
    write_json(given.json or results_folder() / "server-times.json", {
        "header": {"device": device_name(), "threads": info["threads"], "isa": info["isa"], "commit": commit()},
        "command": f"python -m bench.server_times {' '.join(file.name for file in given.prompts)} --llama LLAMA-SERVER "
                   f"--limit {given.limit} --concurrency {' '.join(map(str, given.concurrency))} --max-tokens "
                   f"{given.max_tokens}",
        "model": MODEL, "servers": found, "conversations": turns})
    return 0


if __name__ == "__main__":
    sys.exit(main())
