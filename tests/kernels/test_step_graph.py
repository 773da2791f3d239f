import contextlib
import os
import subprocess
import sys
import threading

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import dflash_kernels as dk
from dflash_kernels import _library, step_graph
from dflash_kernels.testing import same_bits
from tests.support import ROOT, fresh
from tests.support.op_samples import SAMPLES

pytestmark = pytest.mark.skipif(not dk.StepGraph.available(), reason="the C++ library is not built")


def step_of(x, r, w, packed):
    normed, _ = dk.add_rms_norm(x, r, w)
    return dk.linear(normed, packed)


def test_replay_equals_the_step_on_changed_inputs():
    x, r, w = torch.randn(4, 64), torch.randn(4, 64), torch.randn(64)
    packed = dk.pack_weight(torch.randn(48, 64))
    graph = dk.StepGraph()
    with graph.capture():
        out = step_of(x, r, w, packed)
    assert len(graph) == 2
    for seed in range(3):
        torch.manual_seed(seed)
        x.copy_(torch.randn(4, 64))
        r.copy_(torch.randn(4, 64))
        want = step_of(x.clone(), r.clone(), w, packed)
        graph.replay()
        assert same_bits(out, want)


def test_a_capture_imports_no_compiler():
    """torch._dynamo takes a second to import; a dispatch mode that does not say otherwise brings it in."""
    code = """
import sys, torch, dflash_kernels as dk
x, out = torch.zeros(1, 2), torch.empty(1, 1)
graph = dk.StepGraph("cpu")
with graph.capture():
    dk.silu_and_mul(x, out=out)
print(len(graph), "torch._dynamo" in sys.modules)
"""
    ran = fresh.run(code, ROOT, dict(os.environ))
    assert ran.stdout.split() == ["1", "False"], ran.stderr


def test_temporaries_of_the_step_stay_alive():
    x, w = torch.randn(2, 64), torch.ones(64)
    graph = dk.StepGraph()
    with graph.capture():
        out = dk.rms_norm(dk.rms_norm(x, w), w)
    junk = [torch.full((2, 64), 9.0) for _ in range(64)]
    graph.replay()
    assert same_bits(out, dk.rms_norm(dk.rms_norm(x, w), w)) and len(junk) == 64


def test_other_ops_are_refused_in_a_capture():
    graph = dk.StepGraph()
    x, w = torch.randn(2, 64), torch.ones(64)
    with pytest.raises(RuntimeError, match="only dflash ops and views can be captured; got aten.mul"), graph.capture():
        x * 2
    with pytest.raises(RuntimeError, match="nothing is captured yet"):
        graph.replay()
    with graph.capture():
        dk.rms_norm(x.view(1, 2, 64)[0], w)
    assert len(graph) == 1


def test_nothing_is_captured_while_values_are_checked(monkeypatch):
    """A replay checks none, so that a step is called, and checked, each time."""
    monkeypatch.setenv("DFLASH_CHECK", "1")
    assert not dk.StepGraph.available()
    with pytest.raises(RuntimeError, match="StepGraph: DFLASH_CHECK=1 checks the values of every step"):
        dk.StepGraph().capture()


@pytest.mark.parametrize("name", ["prepare_block", "verify_greedy", "verify_sample", "block_attention", "qk_norm_rope",
                                  "write_context_kv"])
def test_values_are_not_read_in_somebodys_capture(name, monkeypatch):
    """In a capture nothing can be read: on a CPU StepGraph refuses an op that is not ours, CUDA every read."""
    sample = next(s for s in SAMPLES.values() if s.function.__name__ == name)
    arguments = sample.arguments()
    with dk.StepGraph().capture():
        monkeypatch.setenv("DFLASH_CHECK", "1")  # as if it were torch.cuda.graph, which no StepGraph guards
        sample.function(**arguments)


def test_a_replay_is_refused_in_a_capture():
    x, w, inner, outer = torch.randn(2, 64), torch.ones(64), dk.StepGraph(), dk.StepGraph()
    with inner.capture():
        dk.rms_norm(x, w)
    with pytest.raises(RuntimeError, match="a replay cannot be captured"), outer.capture():
        inner.replay()
    inner.replay()


def test_captures_do_not_nest():
    a, b = dk.StepGraph(), dk.StepGraph()
    with a.capture(), pytest.raises(RuntimeError, match="already being recorded"), b.capture():
        pass


def test_stream_read_reads_every_byte(isa):
    words = torch.arange(1 << 16, dtype=torch.int64)
    for far in (False, True):
        assert _library.native.stream_read(words.data_ptr(), words.numel() * 8, far) == int(words.sum())


def test_the_rate_of_multiplications_counts_them(isa):
    for what in ("f32", "bf16", "int8"):
        once, twice = (_library.native.matrix_rate(what, rounds) for rounds in (100, 200))
        assert twice == 2 * once > 0 and once % (100 * torch.get_num_threads()) == 0


def test_a_rate_is_of_something_known():
    with pytest.raises(ValueError, match="matrix_rate: what must be f32, bf16 or int8; got f64"):
        _library.native.matrix_rate("f64", 1)


def test_probes_of_the_machine_are_not_captured():
    words, graph = torch.zeros(1 << 12, dtype=torch.int64), dk.StepGraph()
    with graph.capture():
        _library.native.stream_read(words.data_ptr(), words.numel() * 8)
        _library.native.matrix_rate("int8", 1)
    assert len(graph) == 0


def test_an_op_without_a_kernel_cannot_be_captured(monkeypatch):
    for name in ("NAMES", "REFERENCES"):
        monkeypatch.setattr(_library, name, type(getattr(_library, name))())
    op = _library.define("only_a_reference(Tensor x, Tensor(a!) out) -> ()", lambda x, out: out.copy_(x))
    x, out = torch.ones(2), torch.empty(2)
    with (pytest.raises(RuntimeError, match="only_a_reference has no kernel here to capture"),
          dk.StepGraph().capture()):
        op(x, out)


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_replay_has_the_same_bits_whatever_the_number_of_threads(threads):
    x, w = torch.randn(3, 256).bfloat16(), torch.ones(256, dtype=torch.bfloat16)
    weights = [dk.pack_weight((torch.randn(256, 256) / 16).bfloat16()) for _ in range(40)]
    graph, before = dk.StepGraph(), torch.get_num_threads()
    with graph.capture():
        h = x
        for packed in weights:
            h = dk.rms_norm(dk.linear(h, packed), w)
    want = h.clone()
    torch.set_num_threads(threads)
    try:
        for _ in range(50):
            h.fill_(float("nan"))
            graph.replay()
            assert same_bits(h, want)
    finally:
        torch.set_num_threads(before)


def test_replays_of_two_python_threads_do_not_mix():
    def chain(seed):
        torch.manual_seed(seed)
        x, packed = torch.randn(4, 128), [dk.pack_weight(torch.randn(128, 128) / 11) for _ in range(20)]
        graph = dk.StepGraph()
        with graph.capture():
            h = x
            for weight in packed:
                h = dk.linear(h, weight)
        return graph, h, h.clone()

    chains, wrong = [chain(seed) for seed in range(2)], []

    def work(graph, h, want):
        for _ in range(100):
            h.fill_(float("nan"))
            graph.replay()
            if not same_bits(h, want):
                wrong.append(h.clone())

    threads = [threading.Thread(target=work, args=c) for c in chains]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


OUT_OF_MEMORY = """
import resource, threading, torch, dflash_kernels as dk
torch.set_num_threads(2)
x, packed = torch.randn(200_000, 32), dk.pack_weight(torch.randn(64, 32))
graph, errors = dk.StepGraph(), []
with graph.capture():
    out = dk.lm_head_topk(x, packed, 64)

def attempt(call):
    try:
        call()
    except RuntimeError as error:
        errors.append(str(error))

def all_attempts():
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (100 << 20),) * 2)
    attempt(graph.replay)
    attempt(lambda: dk.lm_head_topk(x, packed, 64, out_ids=out[0], out_values=out[1], out_lse=out[2]))
    dk.lm_head_topk(x[:4], packed, 64)

thread = threading.Thread(target=all_attempts)
thread.start()
thread.join()
print(len(errors), "out of memory: a thread needs" in errors[1])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space")
def test_no_memory_for_a_threads_scratch_is_an_error():
    run = subprocess.run([sys.executable, "-c", OUT_OF_MEMORY], capture_output=True, text=True, timeout=120)
    assert run.stdout == "2 True\n", (run.returncode, run.stdout, run.stderr[-2000:])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_named():
    graph = dk.StepGraph("cuda")
    assert not dk.StepGraph.available("cuda") and not dk.StepGraph.available("meta")
    with pytest.raises(RuntimeError, match="StepGraph: cuda is not there"), graph.capture():
        pass
    with pytest.raises(RuntimeError, match="nothing is captured yet"):
        graph.replay()


def test_a_capture_that_nobody_ends_is_over_when_it_is_dropped():
    graph, before = dk.StepGraph(), torch._C._len_torch_dispatch_stack()
    capture = graph.capture()
    capture.__enter__()
    assert _library.native.recording()
    with pytest.raises(RuntimeError, match="only dflash ops"):
        torch.zeros(2)
    del capture
    assert not _library.native.recording() and torch._C._len_torch_dispatch_stack() == before
    assert torch.zeros(2).sum() == 0 and not graph.captured


@pytest.mark.parametrize("kept", [False, True])
def test_an_interrupt_in_a_capture_ends_it_and_keeps_the_graph_as_it_was(kept):
    """Whether or not somebody keeps the exception, and with it the frames; and whatever modes the block has left on."""
    graph, x, w = dk.StepGraph(), torch.randn(2, 64), torch.ones(64)
    for _ in range(2):
        try:
            with graph.capture():
                dk.rms_norm(x, w)
                torch._C._push_on_torch_dispatch_stack(TorchDispatchMode())
                raise KeyboardInterrupt
        except KeyboardInterrupt as interrupt:
            last = interrupt if kept else None
        assert not _library.native.recording() and torch._C._len_torch_dispatch_stack() == 0, last
        assert torch.zeros(2).sum() == 0 and not graph.captured
    with graph.capture():
        dk.rms_norm(x, w)
    assert len(graph) == 1
    with pytest.raises(KeyboardInterrupt), graph.capture():
        raise KeyboardInterrupt
    assert len(graph) == 1
    graph.replay()


def test_a_capture_of_one_thread_is_none_of_another_s(monkeypatch):
    """A reference that another thread calls meanwhile is no part of the step."""
    for name in ("NAMES", "REFERENCES"):
        monkeypatch.setattr(_library, name, type(getattr(_library, name))())
    op = _library.define("a_reference_elsewhere(Tensor x, Tensor(a!) out) -> ()", lambda x, out: None)
    x, out, raised = torch.ones(2), torch.zeros(2), []

    def elsewhere():
        try:
            op(x, out)
        except RuntimeError as error:
            raised.append(error)

    thread = threading.Thread(target=elsewhere)
    with dk.StepGraph().capture():
        thread.start()
        thread.join()
    assert not raised


def test_a_capture_is_on_a_stream_of_its_own_device(monkeypatch):
    """torch's default is of the device where it captured first: on another one it would record nothing."""
    here, streams, captured = [0], [], []

    @contextlib.contextmanager
    def device(given):
        before, index = here[0], torch.device(given).index
        here[0] = before if index is None else index
        yield
        here[0] = before

    @contextlib.contextmanager
    def graph(recording, pool=None, stream=None):
        captured.append((here[0], pool, stream))
        yield

    def stream(given):
        streams.append(given.index)
        return f"a stream of {given}"

    fakes = {"CUDAGraph": object, "current_stream": lambda given=None: "before", "set_stream": None, "graph": graph,
             "device": device, "current_device": lambda: here[0], "Stream": stream,
             "is_current_stream_capturing": lambda: captured.append(here[0])}
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(dk.StepGraph, "available", staticmethod(lambda device: True))
    step_graph._stream_of.cache_clear()
    for given in ("cuda:1", "cuda:0", "cuda", "cuda:1"):
        with dk.StepGraph(given, pool=(1, 2)).capture():
            pass
    step_graph._stream_of.cache_clear()
    assert captured[::2] == [(1, (1, 2), "a stream of cuda:1"), (0, (1, 2), "a stream of cuda:0"),
                             (0, (1, 2), "a stream of cuda:0"), (1, (1, 2), "a stream of cuda:1")]
    assert captured[1::2] == [1, 0, 0, 1] and streams == [1, 0]
