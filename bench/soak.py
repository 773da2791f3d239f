"""Soaks a server of ours: concurrent clients ask for minutes, some leave before the end, and every text is compared
with that of baseline decoding alone.

    python -m bench.soak [--model M] [--minutes N] [--clients N] [--aborts SHARE] [--max-batch N] [--json FILE]

Fails if an answer was lost or differs, if the server ends with work left, or if its memory grew by more than 2 % from
the second quarter of the time to the last one.
"""

import argparse
import asyncio
import json
import random
import re
import signal
import sys
import time
import urllib.request
from collections import Counter
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

from openai import AsyncOpenAI

from bench.servers import free_port, serving
from dflash_bench.metrics import samples
from dflash_decode import LLM
from dflash_decode.llm.params import GenerationParams

CONTEXT, GROWTH = 1024, 1.02
SUBJECTS = ("a prime number", "rain", "a sonnet", "gravity", "bread", "a queue", "the moon", "photosynthesis")
ORDERS = ("Explain {} in one sentence.", "Write two lines about {}.", "List three facts about {}.", "What is {}?")


def questions() -> list[dict[str, Any]]:
    """Messages and parameters: greedy and sampled, short and long, with and without a stop string."""
    made = []
    for i, (order, subject) in enumerate((order, subject) for order in ORDERS for subject in SUBJECTS):
        how: dict[str, Any] = {"messages": [{"role": "user", "content": order.format(subject)}],
                               "max_tokens": 8 + 7 * (i % 9)}
        how |= ({}, {"temperature": 0.9, "top_p": 0.95, "seed": i}, {"stop": ["."]})[i % 3]
        made.append(how)
    return made


def texts_alone(model: str, asked: list[dict[str, Any]]) -> list[str]:
    with LLM(model, "none", max_batch=1, max_context=CONTEXT) as llm:
        return [llm.chat(how["messages"], GenerationParams(**{k: v for k, v in how.items() if k != "messages"})).text
                for how in asked]


class Soak:
    """aborts: the share of requests whose clients leave. tally: what became of the others."""

    def __init__(self, url: str, model: str, asked: list[dict[str, Any]], want: list[str], aborts: float, end: float):
        self.client = AsyncOpenAI(base_url=f"{url}/v1", api_key="EMPTY", max_retries=0, timeout=600)
        self.model, self.asked, self.want, self.aborts, self.end = model, asked, want, aborts, end
        self.tally: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()

    async def worker(self, seed: int) -> None:
        chance = random.Random(seed)
        while time.monotonic() < self.end:
            i, streams = chance.randrange(len(self.asked)), chance.random() < 0.5
            try:
                if chance.random() < self.aborts:
                    await self.leave(i, streams, chance)
                    self.tally["left"] += 1
                    continue
                text = await (self.streamed(i) if streams else self.whole(i))
                self.tally["answered" if text == self.want[i] else "different"] += 1
            except Exception as error:
                self.tally["lost"] += 1
                self.errors[f"{type(error).__name__}: {error}"[:200]] += 1

    async def whole(self, i: int) -> str:
        found = await self.client.chat.completions.create(model=self.model, **self.asked[i])
        return found.choices[0].message.content or ""

    async def streamed(self, i: int, most: int | None = None) -> str:
        """The text, or its first pieces."""
        stream, text, pieces = await self.client.chat.completions.create(model=self.model, stream=True,
                                                                         **self.asked[i]), "", 0
        async with stream:
            async for chunk in stream:
                text, pieces = text + (chunk.choices[0].delta.content or ""), pieces + 1
                if pieces == most:
                    break
        return text

    async def leave(self, i: int, streams: bool, chance: random.Random) -> None:
        if streams:
            await self.streamed(i, chance.randrange(1, 6))
            return
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self.whole(i), chance.random())


def memory(pid: int) -> float:
    """MiB that the process has in memory."""
    return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1]) / 1024  # type: ignore[index]


async def soaked(soak: Soak, clients: int, pid: int) -> list[float]:
    """The server's memory, second by second."""
    found = []
    workers = [asyncio.create_task(soak.worker(seed)) for seed in range(clients)]
    while time.monotonic() < soak.end:
        found.append(memory(pid))
        await asyncio.sleep(1)
    await asyncio.gather(*workers)
    await soak.client.close()
    return found


def gauges(url: str) -> dict[str, float]:
    text = urllib.request.urlopen(f"{url}/metrics", timeout=60).read().decode()
    wanted = ("num_requests_running", "num_requests_waiting", "generation_tokens", "request_success")
    return {f"{name.removeprefix('vllm:')}{found[0] if found else ''}": value for name, labels, value in samples(text)
            if name.removeprefix("vllm:") in wanted for found in [re.findall(r'finished_reason="(\w+)"', labels)]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--aborts", type=float, default=0.1)
    parser.add_argument("--max-batch", type=int, default=16)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    asked = questions()
    want = texts_alone(given.model, asked)
    port = free_port()
    command = [sys.executable, "-m", "dflash_decode.cli", "serve", "--model", given.model, "--port", f"{port}",
               "--max-context", f"{CONTEXT}", "--max-batch", f"{given.max_batch}", "--max-queue", f"{given.clients}"]
    with serving(command, port) as (process, url):
        soak = Soak(url, given.model, asked, want, given.aborts, time.monotonic() + 60 * given.minutes)
        before = time.monotonic()
        used = asyncio.run(soaked(soak, given.clients, process.pid))
        seconds = time.monotonic() - before
        for _ in range(100):  # those that left a moment ago
            left = gauges(url)
            if not left["num_requests_running"] + left["num_requests_waiting"]:
                break
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        code = process.wait(60)
    quarters = [round(median(used[len(used) * k // 4:len(used) * (k + 1) // 4]), 1) for k in range(4)]
    good = (not soak.tally["lost"] and not soak.tally["different"] and not code and quarters[3] <= GROWTH * quarters[1]
            and not left["num_requests_running"] + left["num_requests_waiting"])
    report = {"good": bool(good), "clients": given.clients, "max_batch": given.max_batch, "seconds": round(seconds, 1),
              **{name: soak.tally[name] for name in ("answered", "left", "different", "lost")},
              "errors": dict(soak.errors), "tokens_per_s": round(left["generation_tokens"] / seconds, 1),
              "memory_mib_by_quarter": quarters, "memory_mib_most": round(max(used), 1), "server": left,
              "exit_code": code}
    print(json.dumps(report, indent=1))
    if given.json:
        given.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
