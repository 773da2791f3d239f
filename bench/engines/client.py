"""Typical clients of a server: the model card's snippet, streaming, concurrent requests, a client that leaves, and a
prompt that is too long.

    python -m bench.engines.client http://127.0.0.1:PORT model reply.json

It runs in the engine's environment, which has the openai package.
"""

import asyncio
import json
import sys
import time
import urllib.request
from pathlib import Path

from openai import AsyncOpenAI, BadRequestError, OpenAI

CONCURRENCY, TOKENS, LIMIT = 32, 48, 1024
QUESTION = "Write a quicksort in Python."


def card(base: str, model: str) -> str:
    """The snippet of DFlash's model cards."""
    client = OpenAI(base_url=f"{base}/v1", api_key="EMPTY")
    response = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": QUESTION}], max_tokens=TOKENS, temperature=0.0)
    return response.choices[0].message.content


async def streamed(client: AsyncOpenAI, model: str, question: str = QUESTION) -> list[str]:
    """The pieces of a streamed answer."""
    stream = await client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": question}], max_tokens=TOKENS, temperature=0.0, stream=True)
    return [chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices]


async def leaves(client: AsyncOpenAI, model: str, base: str) -> dict:
    """Requests a text as long as the engine's limit, reads a little, closes the connection, and waits until no more
    tokens are generated: fewer than requested, if the engine dropped the request."""
    before = metrics(base)
    stream = await client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": QUESTION}], max_tokens=LIMIT - 64, temperature=0.0,
        stream=True, extra_body={"ignore_eos": True})
    pieces = 0
    async for _ in stream:
        pieces += 1
        if pieces == 3:
            await stream.close()
            break
    made, last = metrics(base)["tokens"], -1.0
    while made != last:
        await asyncio.sleep(5)
        made, last = metrics(base)["tokens"], made
    return {"pieces_read": pieces, "tokens_asked": LIMIT - 64, "tokens_made": made - before["tokens"]}


async def scenes(base: str, model: str) -> dict:
    """The expected behaviours, whether each happened, and the observed values."""
    client = AsyncOpenAI(base_url=f"{base}/v1", api_key="EMPTY", max_retries=0, timeout=1800)
    baseline, found, seen = card(base, model), {}, {}
    found["chat completions answer"] = bool(baseline.strip())
    pieces = await streamed(client, model)
    seen["pieces"] = len(pieces)
    found["streaming gives the same text, in pieces"] = "".join(pieces) == baseline and len(pieces) > 3
    questions = [f"What is {n} times {n + 1}?" for n in range(CONCURRENCY)]
    began, before = time.perf_counter(), metrics(base)
    texts = ["".join(p) for p in await asyncio.gather(*(streamed(client, model, q) for q in questions))]
    seen |= {
        "concurrent_seconds": round(time.perf_counter() - began, 2),
        "answers": sum(bool(t.strip()) for t in texts),
        "different_answers": len(set(texts)),
        "concurrent_tokens": metrics(base)["tokens"] - before["tokens"],
    }
    found[f"{CONCURRENCY} concurrent requests are all answered"] = (seen["answers"] == CONCURRENCY
                                                    and seen["different_answers"] > CONCURRENCY / 2)
    seen["left"] = left = await leaves(client, model, base)
    found["a client leaves: its request ends early"] = 0 < left["tokens_made"] < left["tokens_asked"] / 2
    found["the next one gets the same text"] = "".join(await streamed(client, model)) == baseline
    try:
        await streamed(client, model, "word " * 2 * LIMIT)
        found["a prompt that is too long is refused"] = False
    except BadRequestError as error:
        seen["refusal"] = [error.status_code, str(error.body.get("message") if isinstance(error.body, dict) else error)]
        found["a prompt that is too long is refused"] = error.status_code == 400
    found["and the next one gets the same text"] = "".join(await streamed(client, model)) == baseline
    return {"scenes": found, "seen": seen}


COUNTERS = {"vllm:spec_decode_num_drafts_total": "drafts", "vllm:spec_decode_num_draft_tokens_total": "draft_tokens",
            "vllm:spec_decode_num_accepted_tokens_total": "accepted_tokens",
            "vllm:generation_tokens_total": "tokens"}


def metrics(base: str) -> dict[str, float]:
    text = urllib.request.urlopen(f"{base}/metrics", timeout=300).read().decode()
    found = {}
    for line in text.splitlines():
        if name := COUNTERS.get(line.split("{")[0]):
            found[name] = float(line.rsplit(" ", 1)[1])
    return found


def main() -> None:
    base, model, reply = sys.argv[1:]
    found = asyncio.run(scenes(base, model)) | {"metrics": metrics(base)}
    Path(reply).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
