"""Training conversations that the target writes: prompts at temperature 1, answers mostly greedy or sampled.

A prompt is the target's own continuation of an empty user turn, the idea of Magpie (arXiv 2406.08464). Openings steer a
share of them to code, mathematics and everyday tasks. Files are JSON lines of source, prompt, answer, temperature and
finish.
"""

import gzip
import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path

from dflash_decode.checkpoint.tokenizer import Tokenizer

from .target import Target, Writing

OPENINGS = {
    "open": ("",),
    "code": ("Write a Python function", "Write a Python function that", "Implement a function", "Write a program that",
             "Complete the following Python function:\n```python\ndef ", "What does this Python code do?\n```python\n",
             "Given a list of integers,", "Given a string,", "Write code to", "Fix this Python function"),
    "mathematics": ("What is the value of", "Solve for $x$:", "Find the", "Let $", "Compute", "How many", "If $",
                    "Simplify", "Evaluate", "What is the sum", "A rectangle", "What is the probability", "Determine",
                    "The function $f(x)", "Suppose", "Find all", "In triangle"),
    "everyday": ("Write a", "Explain", "Describe", "Imagine you are", "Compare", "Draft an email", "What are", "How do",
                 "Why", "Summarize", "Given the following", "Can you", "Suggest", "I have", "Who"),
}
SHARES = {"open": 0.25, "code": 0.25, "mathematics": 0.3, "everyday": 0.2}


def read_jsonl(file: Path) -> list[dict]:
    data = file.read_bytes()
    text = (gzip.decompress(data) if file.suffix == ".gz" else data).decode("utf-8")
    return [json.loads(line) for line in text.split("\n") if line]


def chat_ids(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """The ids of one user message, up to the start of the answer."""
    return tokenizer.encode(tokenizer.apply_chat_template([{"role": "user", "content": prompt}]))


def write_prompts(target: Target, tokenizer: Tokenizer, count: int, slots: int, seed: int) -> Iterator[tuple[str, str]]:
    """(kind, prompt) pairs from `count` tries: those that ended with a stop token, without repeats."""
    draw, empty = random.Random(seed), tokenizer.apply_chat_template([{"role": "user", "content": "\0"}])
    before = empty.split("\0")[0]
    kinds, seen = list(SHARES), set()

    def turns():
        for _ in range(count):
            kind = draw.choices(kinds, [SHARES[k] for k in kinds])[0]
            opening = draw.choice(OPENINGS[kind])
            yield Writing((kind, opening), tokenizer.encode(before + opening), 1.0, 128)

    for text in target.write(turns(), tokenizer.stop_ids, slots, 256, seed):
        kind, opening = text.key
        prompt = (opening + tokenizer.decode(text.answer)).strip()
        if text.finish == "stop" and len(text.answer) >= 4 and prompt not in seen:
            seen.add(prompt)
            yield kind, prompt


def write_answers(target: Target, tokenizer: Tokenizer, prompts: Iterable[tuple[str, str]], slots: int, budget: int,
                  sampled: float, seed: int, capacity: int = 512) -> Iterator[dict]:
    """One conversation per (source, prompt), a share `sampled` of them at temperature 0.8."""
    draw = random.Random(seed)

    def turns():
        for source, prompt in prompts:
            ids = chat_ids(tokenizer, prompt)
            if len(ids) < capacity // 2:
                yield Writing((source, prompt), ids, 0.8 if draw.random() < sampled else 0.0, budget)

    for text in target.write(turns(), tokenizer.stop_ids, slots, capacity, seed):
        source, prompt = text.key
        yield {"source": source, "prompt": prompt, "answer": tokenizer.decode(text.answer),
               "temperature": text.temperature, "finish": text.finish}
