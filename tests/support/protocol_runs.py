"""Prompts of one turn and of two, and the protocol over them."""

from dflash_bench import protocol
from dflash_bench.decode import Prompt

ONE = [Prompt("gsm8k", f"g{i}", (f"question {i}",)) for i in range(4)]
TWO = [Prompt("mt_bench", f"m{i}", (f"first {i}", f"second {i}")) for i in range(3)]


def measured(answerer, prompts, concurrencies, file):
    journal = protocol.Journal(file, answerer.about)
    protocol.measure(answerer, prompts, concurrencies, journal)
    return protocol.figures(journal, prompts, concurrencies)
