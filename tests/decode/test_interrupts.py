"""A KeyboardInterrupt between any two lines leaves everything right: nothing is being captured, no page is lost, and
the decoder goes on, or decodes the next requests, with the texts that it would have had.

Every line of the loop's files that a short decode runs is interrupted, where it runs first and, of the decoder's own,
where it runs last, and what deals with pages between all bytecodes; the exception is kept meanwhile, as a shell keeps
its last one. `python tests/decode/test_interrupts.py` interrupts every execution of every line, and all bytecodes.
"""

import itertools
import linecache
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import dflash_decode.loop
import dflash_kernels as dk
from dflash_decode.costs import Curve, StepCosts
from dflash_decode.loop import Decoder
from dflash_decode.model.drafter import Drafter
from dflash_decode.requests import Request
from dflash_decode.sampling import SamplingParams
from dflash_decode.widths import WidthPolicy
from dflash_kernels import _library
from dflash_kernels.testing import same_bits
from tests.support.decode_runs import random_target

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not dk.StepGraph.available(), reason="the C++ library is not built")]
LOOP, KERNELS = Path(dflash_decode.loop.__file__).parent, Path(dk.__file__).parent
NAMES = ("loop", "step", "kv", "prefixes", "requests", "logprobs", "sampling", "inputs", "adjust", "verify", "runner",
         "packed_runner", "packed", "widths", "load", "costs",
         "model/drafter", "model/transformer", "model/native")
FILES = {str(KERNELS / "step_graph.py"), *(str(LOOP / f"{name}.py") for name in NAMES)}


class Tracer:
    """Notes the places where our files' code comes by, and raises at the n-th time at one of them."""

    def __init__(self, at=None, nth=1, opcodes=False):
        self.at, self.left, self.opcodes, self.seen, self.fired = at, nth, opcodes, {}, False
        self.files = FILES if at is None else {at[0]}
        self.telling = False  # whether events were on their way, which are lost then

    @contextmanager
    def on(self):
        sys.settrace(self._call)
        try:
            yield
        finally:
            sys.settrace(None)

    def _call(self, frame, event, _argument):
        if frame.f_code.co_filename not in self.files:
            return None
        if self.opcodes:
            frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return self._line

    def _line(self, frame, event, _argument):
        if event == ("opcode" if self.opcodes else "line"):
            place = (frame.f_code.co_filename, frame.f_code.co_qualname, frame.f_lasti) if self.opcodes else (
                frame.f_code.co_filename, frame.f_lineno)
            self.seen[place] = self.seen.get(place, 0) + 1
            if place == self.at and self.seen[place] == self.left:
                self.fired, self.telling = True, self._telling(frame)
                raise KeyboardInterrupt
        return self._line


    def _telling(self, frame):
        line = linecache.getline(frame.f_code.co_filename, frame.f_lineno or 0)
        if self.opcodes and line.strip() == "return self._tell()":
            return True
        while frame and frame.f_code.co_name != "_tell":
            frame = frame.f_back
        return frame is not None


class Even:
    """A grammar: even tokens."""

    def fill_bitmask(self, tokens, words):
        words.fill_(0x55555555)


REQUESTS = [Request(0, [9] * 18, 5, (), SamplingParams(0.9, seed=1)), Request(1, [5, 6, 7], 4, logprobs=1),
            Request(2, [3], 1),
            Request(3, [8, 8], 3, (), SamplingParams(frequency_penalty=0.5, logit_bias={4: 1.0}, grammar=Even()))]


@pytest.fixture(scope="module")
def models():
    return make_models()


def make_models():
    target = random_target("llama", torch.float32, "cpu", hidden=16, inner=16, heads=1, kv_heads=1, layers=1)
    return target, Drafter.random(target, num_layers=1, block_size=3)


class Steady(Decoder):
    """Nothing that it does depends on time."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        costs = StepCosts({1: 1.0, 2: 1.05, 4: 1.1, 6: 1.2}, {1: 0.05, 2: 0.06})
        for curve in (costs.verify, costs.draft):
            curve.observe = lambda size, _, curve=curve: Curve.observe(curve, size, 1.01 * curve(size))
        self.runner.policy = WidthPolicy(self.width, costs)

    def _rows_beside_a_step(self):
        return 16


def decoder_of(models):
    """With pages for the longest request, so that one lost page is one too many."""
    return Steady(*models, max_batch=2, max_context=32, num_pages=6, page_size=4, prefill_rows=16)


def streamed(decoder, requests=REQUESTS):
    texts = {}
    for event in decoder.stream(iter(requests)):
        assert event.error is None
        texts.setdefault(event.id, []).extend(event.tokens)
    return texts


def stepped(decoder, told=None):
    """The same, of a caller that steps itself, cancels one, and notes what it is told."""
    told = {} if told is None else told
    for request in (*REQUESTS, Request("leaves", [1], 20)):
        decoder.submit(request)
    go_on(decoder, told)
    return told


def go_on(decoder, told):
    for _ in range(100):
        for event in decoder.step():
            told.setdefault(event.id, []).extend(event.tokens + [event.finish] * bool(event.finish))
        decoder.cancel("leaves")
    assert not decoder._requests


def check(decoder, texts, replayed):
    """After an interrupt, whose exception is still there."""
    assert not _library.native.recording() and torch._C._len_torch_dispatch_stack() == 0
    assert torch.zeros(3).sum() == 0
    graph, out, want = replayed
    out.fill_(float("nan"))
    graph.replay()
    assert same_bits(out, want)
    assert decoder.pool.free_pages == decoder.pool.num_pages
    assert streamed(decoder, REQUESTS[:2]) == {0: texts[0], 1: texts[1]}
    assert decoder.pool.free_pages == decoder.pool.num_pages


def some_graph():
    graph, x, weight = dk.StepGraph(), torch.randn(2, 16), torch.ones(16)
    with graph.capture():
        out = dk.rms_norm(x, weight)
    return graph, out, out.clone()


def interrupt_stream(models, texts, replayed, tracer):
    decoder = decoder_of(models)
    try:
        with tracer.on():
            streamed(decoder)
    except KeyboardInterrupt as interrupt:
        kept = interrupt
        check(decoder, texts, replayed)
        return kept


def interrupt_steps(models, texts, replayed, tracer):
    """The caller goes on stepping: what had been submitted is answered as if nothing had happened."""
    decoder, told = decoder_of(models), {}
    try:
        with tracer.on():
            stepped(decoder, told)
    except KeyboardInterrupt as interrupt:
        kept, lives = interrupt, list(decoder._requests)
        go_on(decoder, told)
        for live in lives:
            if live.request.id in texts:
                assert (live.text, live.finish) == (texts[live.request.id], "length")
                assert tracer.telling or told[live.request.id] == [*live.text, "length"]
        check(decoder, texts, replayed)
        return kept


def interrupted(way, models, texts, replayed, tracer):
    try:
        way(models, texts, replayed, tracer)
    except BaseException as error:
        raise AssertionError(f"after an interrupt at {tracer.at}: {type(error).__name__}: {error}") from error


WAYS = {interrupt_stream: streamed, interrupt_steps: stepped}


def places(models, decode, **options):
    tracer = Tracer(**options)
    decoder = decoder_of(models)
    with tracer.on():
        decode(decoder)
    return tracer.seen


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_an_interrupt_at_any_line_leaves_everything_right(models, way):
    texts, replayed = streamed(decoder_of(models)), some_graph()
    assert {key: len(text) for key, text in texts.items()} == {r.id: r.max_tokens for r in REQUESTS}
    lines = places(models, WAYS[way])
    assert len(lines) > 300 and {file for file, _ in lines} == FILES
    for (file, line), times in lines.items():
        stem = Path(file).stem
        if way is interrupt_steps and stem in ("transformer", "drafter", "native", "packed", "widths", "load", "costs"):
            continue  # they know nothing of who calls
        for nth in {1, times if stem in ("loop", "requests", "kv", "prefixes") else 1}:
            tracer = Tracer((file, line), nth)
            interrupted(way, models, texts, replayed, tracer)
            assert tracer.fired, (file, line)


def test_an_interrupt_between_any_two_bytecodes_loses_no_page(models):
    """Whoever calls for pages, and whoever gives them back."""
    texts, replayed = streamed(decoder_of(models)), some_graph()
    named = {interrupt_steps: {"Decoder._start", "Decoder._next_to_start", "Decoder._tell", "PagePool.allocate",
                               "Decoder._remember", "PagePool.keep", "Prefixes.trim", "Prefixes._use"},
             interrupt_stream: {"Decoder.close", "PagePool.forget"}}
    for way, names in named.items():
        found = [place for place in places(models, WAYS[way], opcodes=True) if place[1] in names]
        assert {name for _, name, _ in found} == names
        for place in found:
            tracer = Tracer(place, opcodes=True)
            interrupted(way, models, texts, replayed, tracer)
            assert tracer.fired, place


def test_an_interrupt_while_a_stream_is_closed_leaves_nobody_behind(models):
    texts, replayed = streamed(decoder_of(models)), some_graph()

    def close_early(tracer):
        decoder = decoder_of(models)
        stream = decoder.stream(iter(REQUESTS))
        next(stream)
        assert decoder._requests and decoder.pool.free_pages < decoder.pool.num_pages
        try:
            with tracer.on():
                stream.close()
        except KeyboardInterrupt as interrupt:
            check(decoder, texts, replayed)
            return interrupt

    close_early(counted := Tracer())
    assert len(counted.seen) > 10
    for place, times in counted.seen.items():
        for nth in range(1, times + 1):
            assert close_early(Tracer(place, nth))


def test_pages_that_an_interrupt_left_without_an_owner_serve_the_next_request(models):
    decoder = decoder_of(models)
    decoder.pool.allocate(4)  # and nobody was told
    decoder.submit(REQUESTS[0])
    while not (events := decoder.step()):
        pass
    assert [event.id for event in events] == [0]


def main():
    models = make_models()
    texts, replayed = streamed(decoder_of(models)), some_graph()
    for opcodes, (way, decode) in itertools.product((False, True), WAYS.items()):
        seen, failed = places(models, decode, opcodes=opcodes), 0
        cases = [(place, n) for place, count in seen.items() for n in range(1, (1 if opcodes else count) + 1)]
        for place, n in cases:
            try:
                way(models, texts, replayed, Tracer(place, n, opcodes))
            except BaseException as error:
                failed += 1
                print(f"{way.__name__}, {place}, time {n}: {type(error).__name__}: {str(error)[:200]}")
        print(f"{way.__name__}, {'bytecodes' if opcodes else 'lines'}: {len(cases)} interrupts, {failed} failed")


if __name__ == "__main__":
    main()
