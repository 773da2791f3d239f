"""What users do to a server: the model card's snippet, streaming, many at once, one who leaves, one who asks too much.

    python client.py http://127.0.0.1:PORT model reply.json

Runs in the engine's environment, which has the openai package.
"""

import asyncio
import json
import sys
import time
import urllib.request
from pathlib import Path

from openai import AsyncOpenAI, BadRequestError, OpenAI

AT_ONCE, TOKENS, LIMIT = 32, 48, 1024
QUESTION = "Write a quicksort in Python."


def card(base: str, model: str) -> str:
    """The snippet of DFlash's model cards."""
    client = OpenAI(base_url=f"{base}/v1", api_key="EMPTY")
    response = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": QUESTION}], max_tokens=TOKENS, temperature=0.0)
    return response.choices[0].message.content


async def streamed(client: AsyncOpenAI, model: str, question: str = QUESTION, leave_after: int | None = None) -> str:
    stream = await client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": question}], max_tokens=TOKENS, temperature=0.0, stream=True)
    pieces = []
    async for chunk in stream:
        pieces.append(chunk.choices[0].delta.content or "")
        if leave_after and len(pieces) == leave_after:
            await stream.close()
            break
    return "".join(pieces)


async def scenes(base: str, model: str) -> dict:
    client = AsyncOpenAI(base_url=f"{base}/v1", api_key="EMPTY", max_retries=0)
    plain, found = card(base, model), {}
    found["chat"] = bool(plain.strip())
    found["streaming gives the same text"] = await streamed(client, model) == plain
    questions = [f"What is {n} times {n + 1}?" for n in range(AT_ONCE)]
    began = time.perf_counter()
    texts = await asyncio.gather(*(streamed(client, model, q) for q in questions))
    found[f"{AT_ONCE} at once"] = sum(bool(text.strip()) for text in texts) == AT_ONCE
    seconds = time.perf_counter() - began
    await streamed(client, model, leave_after=2)
    found["a client leaves; the next is served"] = await streamed(client, model) == plain
    try:
        await streamed(client, model, "word " * 2 * LIMIT)
        found["a prompt that is too long is refused"] = False
    except BadRequestError:
        found["a prompt that is too long is refused"] = await streamed(client, model) == plain
    return {"scenes": found, "seconds_at_once": round(seconds, 2)}


def metrics(base: str) -> dict[str, float]:
    text = urllib.request.urlopen(f"{base}/metrics", timeout=60).read().decode()
    found = {}
    for line in text.splitlines():
        if line.startswith("vllm:spec_decode_num_") and "_per_pos" not in line and "_created" not in line:
            name, value = line.split("{")[0], line.rsplit(" ", 1)[1]
            found[name.removeprefix("vllm:spec_decode_num_").removesuffix("_total")] = float(value)
    return found


def main() -> None:
    base, model, reply = sys.argv[1:]
    found = asyncio.run(scenes(base, model)) | {"metrics": metrics(base)}
    Path(reply).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
