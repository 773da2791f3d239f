import pytest
import torch

import dflash_kernels as dk
from dflash_kernels import _library
from dflash_kernels.testing import same_bits

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


def test_captures_do_not_nest():
    a, b = dk.StepGraph(), dk.StepGraph()
    with a.capture(), pytest.raises(RuntimeError, match="already being recorded"), b.capture():
        pass


def test_stream_read_reads_every_byte(isa):
    words = torch.arange(1 << 16, dtype=torch.int64)
    assert _library.native.stream_read(words.data_ptr(), words.numel() * 8) == int(words.sum())


def test_an_op_without_a_kernel_cannot_be_captured(monkeypatch):
    for name in ("NAMES", "REFERENCES"):
        monkeypatch.setattr(_library, name, type(getattr(_library, name))())
    op = _library.define("only_a_reference(Tensor x, Tensor(a!) out) -> ()", lambda x, out: out.copy_(x))
    x, out = torch.ones(2), torch.empty(2)
    with (pytest.raises(RuntimeError, match="only_a_reference has no kernel here to capture"),
          dk.StepGraph().capture()):
        op(x, out)
