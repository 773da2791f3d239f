"""Time to first token and tokens/s of a server that speaks OpenAI's API, as its clients see them.

    python -m bench.server_times PROMPTS.jsonl... --base-url URL [--limit N] [--concurrency N...] [--max-tokens N]

Greedy chats, streamed; one round of all prompts goes before the one that is measured. llama-server is told not to reuse
that round's prompts.
"""

import argparse
import asyncio
import json
import sys
import time
from pathlib import Path
from statistics import median

from openai import AsyncOpenAI

from dflash_bench.decode import Prompt, read_prompts


async def timed(client: AsyncOpenAI, model: str, prompt: Prompt, max_tokens: int) -> tuple[float, int]:
    """(seconds to the first text, tokens)"""
    began, first, tokens = time.perf_counter(), 0.0, 0
    stream = await client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": prompt.turns[0]}], max_tokens=max_tokens, temperature=0.0,
        stream=True, stream_options={"include_usage": True}, extra_body={"cache_prompt": False})
    async for chunk in stream:
        if not first and chunk.choices and chunk.choices[0].delta.content:
            first = time.perf_counter() - began
        tokens = chunk.usage.completion_tokens if chunk.usage else tokens
    return first, tokens


async def measured(url: str, prompts: list[Prompt], concurrency: int, max_tokens: int) -> dict:
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="EMPTY", max_retries=2, timeout=600) as client:
        model, room = (await client.models.list()).data[0].id, asyncio.Semaphore(concurrency)

        async def one(prompt: Prompt) -> tuple[float, int]:
            async with room:
                return await timed(client, model, prompt, max_tokens)

        await asyncio.gather(*map(one, prompts))
        began = time.perf_counter()
        found = await asyncio.gather(*map(one, prompts))
        seconds = time.perf_counter() - began
    firsts, tokens = [first for first, _ in found], sum(count for _, count in found)
    return {"concurrency": concurrency, "prompts": len(prompts), "tokens": tokens,
            "tokens_per_s": round(tokens / seconds, 1), "first_token_median_s": round(median(firsts), 4),
            "first_token_most_s": round(max(firsts), 4)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompts", nargs="+", type=Path)
    parser.add_argument("--base-url", required=True)
    parser.add_argument("--limit", type=int, default=8)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--max-tokens", type=int, default=64)
    given = parser.parse_args()
    prompts = [row for file in given.prompts for row in read_prompts(file, given.limit)]
    for concurrency in given.concurrency:
        print(json.dumps(asyncio.run(measured(given.base_url, prompts, concurrency, given.max_tokens))), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
