"""bench/peers: steps by part, of decoders that are made up, of ours, and of the reference where it is installed."""

import sys
from types import SimpleNamespace

import pytest
import torch

from bench.peers import job, sums, watched_step
from bench.peers.passes import DRAFT, VERIFY, Passes
from dflash_decode.packed import VerifyStage
from dflash_decode.session import NONE, Session
from tests.support import tiny
from tests.support.clocks import Clock, Ticks

TOKENS = 12


def test_a_step_goes_from_one_target_pass_to_the_next():
    clock = Clock()
    passes = Passes(clock)
    forward, head = passes.part(VERIFY, clock.work, opens=True), passes.part(VERIFY, clock.work)
    draft = passes.part(DRAFT, clock.work)
    for long in (100.0, 50.0):  # two prompts, whose passes and first drafts are no steps
        passes.prompt()
        forward(long), draft(long)
        for i in range(3):
            forward(4.0 + i), clock.work(0.25), head(1.0), clock.work(0.5), draft(2.0), clock.work(0.125)
    once = [{"step": 7.875 + i, VERIFY: 5.0 + i, DRAFT: 2.0} for i in range(2)]  # the third has no end
    assert passes.taken() == once + once and passes.taken() == []


def test_a_part_inside_another_is_counted_once():
    clock = Clock()
    passes = Passes(clock)
    head = passes.part(DRAFT, clock.work)
    forward = passes.part(VERIFY, lambda: head(3.0), opens=True)
    for _ in range(3):
        forward(), head(1.0)
    assert passes.taken() == [{"step": 4.0, VERIFY: 3.0, DRAFT: 1.0}]


def test_a_pass_that_fails_is_over():
    passes, clock = Passes(), Clock()
    with pytest.raises(ZeroDivisionError):
        passes.part(VERIFY, lambda: 1 / 0, opens=True)()
    passes._clock = clock
    for _ in range(3):
        passes.part(VERIFY, clock.work, opens=True)(1.0)
    assert passes.taken()[-1] == {"step": 1.0, VERIFY: 1.0}


def test_parts_are_medians_over_all_steps():
    steps = [{"step": 10.0, VERIFY: 6.0, DRAFT: 1.0}, {"step": 12.0, VERIFY: 7.0, DRAFT: 2.0},
             {"step": 30.0, VERIFY: 8.0, DRAFT: 3.0}]
    replies = [job.Reply(1.0, [4], parts=steps[:2]), job.Reply(1.0, [2], parts=steps[2:])]
    for _ in range(2):  # the driver asks after every answer
        assert sums.parts_row(("x", "dflash", 2), replies) == {
            "peer": "x", "mode": "dflash", "threads": 2, "prompts": 2, "steps": 3, "draft_ms": 2000.0,
            "verify_ms": 7000.0, "rest_ms": 3000.0, "step_ms": 12000.0, "whole": ""}


def test_parts_of_peers_that_tell_less():
    baseline = sums.parts_row(("x", "baseline", 1), [job.Reply(1.0, [2], parts=[{"step": 2.0, VERIFY: 1.5}])])
    assert (baseline["draft_ms"], baseline["verify_ms"], baseline["rest_ms"]) == (None, 1500.0, 500.0)
    whole = sums.parts_row(("x", "baseline", 1), [job.Reply(1.0, [2], parts=[{"step": 2.0}], whole="why")] * 2)
    assert (whole["verify_ms"], whole["rest_ms"], whole["step_ms"], whole["whole"]) == (None, None, 2000.0, "why")
    none = sums.parts_row(("x", "baseline", 1), [job.Reply(1.0, [1])])
    assert none["steps"] == 0 and none["step_ms"] is None


def test_a_decoder_is_watched_from_the_first_such_question_on():
    made, model = [], SimpleNamespace(forward=lambda: None)

    def watch(passes):
        made.append(passes)
        model.forward = passes.part(VERIFY, model.forward, opens=True)

    def answering(asked):
        for _ in range(asked.max_tokens):
            model.forward()
        return job.Reply(1.0, [asked.max_tokens])

    watched = job.Watched(answering, watch)
    counts = [len(watched(job.Question([[1]], n, watched=True)).parts) for n in (5, 1, 4)]
    assert counts == [3, 0, 2] and len(made) == 1


def test_a_decoder_that_cannot_be_watched_answers_and_says_why():
    def watch(passes):
        raise NotImplementedError("it hides")

    reply = job.Watched(lambda asked: job.Reply(1.0, [3]), watch)(job.Question([[1]], 3, watched=True))
    assert (reply.counts, reply.parts, reply.whole) == ([3], [], "it hides")


@pytest.fixture
def files(tmp_path):
    return str(tiny.write_target(tmp_path / "target")), str(tiny.write_drafter(tmp_path / "draft"))


def slowed(function, clock):
    """The function, which alone takes time: a second."""
    def slow(*args, **kwargs):
        clock.work(1.0)
        return function(*args, **kwargs)
    return slow


def seconds(steps):
    """What each step took, by part."""
    return [{name: sums.with_rest(step).get(name, 0.0) for name in ("draft", "verify", "rest")} for step in steps]


def ours(monkeypatch, files, clock, mode=job.DFLASH, plant=lambda session: None, prompts=([5, 6, 7],)):
    """(passes, then tokens and steps of each answer unwatched and watched) of our loop."""
    for stage in watched_step.STAGES:
        monkeypatch.setattr(stage, "__call__", stage.__call__)
    session = Session.load(files[0], files[1] if mode == job.DFLASH else NONE, block_size=4)
    plant(session)

    def answer():
        return [(a.tokens, a.steps) for a in session.run(prompts, max_tokens=TOKENS).answers]

    before, passes = answer(), Passes(clock)
    watched_step.watch(passes)
    return passes, before, answer()


@pytest.mark.parametrize("mode", [job.BASELINE, job.DFLASH])
def test_our_steps_by_part(monkeypatch, files, mode):
    passes, before, after = ours(monkeypatch, files, Ticks(), mode, prompts=([5, 6, 7], [9] * 20))
    assert before == after
    steps = passes.taken()
    # A prompt's pass is no step, and an answer's last step has no end.
    assert len(steps) == sum(len(answer[1]) - 1 for answer in after)
    names = {"step", VERIFY, DRAFT} if mode == job.DFLASH else {"step", VERIFY}
    for step in steps:
        assert step.keys() == names and 0 < sum(step.values()) - step["step"] < step["step"]


@pytest.mark.parametrize("name", ["verify", "head", "draft", "context", "rest"])
def test_what_is_slow_shows_in_its_part(monkeypatch, files, name):
    """Called, not replayed, so that a call can be made slow."""
    clock = Clock()

    def plant(session):
        target, drafter = session.target, session.drafter
        target.graph_safe = drafter.graph_safe = False
        if name == "head":
            target.next_ids = slowed(target.next_ids, clock)
        elif name == "rest":
            monkeypatch.setattr(VerifyStage, "fill", slowed(VerifyStage.fill, clock))
        else:
            owner, make = {"verify": (target, "make_pass"), "draft": (drafter, "make_draft"),
                           "context": (drafter, "make_context")}[name]
            inner = getattr(owner, make)

            def made(*args):
                one = inner(*args)
                one.run = slowed(one.run, clock)
                return one

            setattr(owner, make, made)

    passes, *_ = ours(monkeypatch, files, clock, plant=plant)
    where, steps = {"head": "verify", "context": "draft"}.get(name, name), passes.taken()
    assert steps and seconds(steps) == [{"draft": 0.0, "verify": 0.0, "rest": 0.0, where: 1.0}] * len(steps)


def answers(peer, made_for, clock):
    """One question's reply before and after the peer is watched."""
    answering, _, watch = peer.load(made_for)
    asked = job.Question([[5, 6, 7]], TOKENS, watched=True)
    return answering(asked), job.Watched(answering, watch, clock)(asked)


def a_job(mode, model, draft):
    return job.Job(mode, model, draft, 4, 64, 1, torch.get_num_threads(), [263], "float32")


def test_transformers_steps_are_its_passes(files):
    pytest.importorskip("transformers")
    from bench.peers import peer_transformers

    before, after = answers(peer_transformers, a_job(job.BASELINE, files[0], None), Ticks())
    assert before.tokens == after.tokens and len(after.parts) == after.counts[0] - 2
    assert all(step.keys() == {"step", VERIFY} and step[VERIFY] < step["step"] for step in after.parts)


@pytest.mark.parametrize("slow", ["target", "drafter", "head"])
def test_the_references_steps_by_part(files, monkeypatch, slow):
    pytest.importorskip("dflash")
    from bench.peers import peer_dflash

    clock = Clock()
    # The head of both is the target's: in a target pass it is the target's time, after the drafter's pass the draft's.
    import transformers
    load = transformers.AutoModelForCausalLM.from_pretrained
    loaded = peer_dflash.reference.DFlashDraftModel.from_pretrained

    def target(*args, **kwargs):
        model = load(*args, **kwargs)
        if slow == "target":
            model.model.forward = slowed(model.model.forward, clock)
        if slow == "head":
            model.lm_head.forward = slowed(model.lm_head.forward, clock)
        return model

    def drafter(*args, **kwargs):
        model = loaded(*args, **kwargs)
        if slow == "drafter":
            model.forward = slowed(model.forward, clock)
        return model

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", target)
    monkeypatch.setattr(peer_dflash.reference.DFlashDraftModel, "from_pretrained", drafter)
    before, after = answers(peer_dflash, a_job(job.DFLASH, *files), clock)
    assert before.tokens == after.tokens and len(after.parts) == after.steps[0] - 1 > 0
    took = {"target": {"verify": 1.0}, "drafter": {"draft": 1.0}, "head": {"draft": 1.0, "verify": 1.0}}[slow]
    assert seconds(after.parts) == [{"draft": 0.0, "verify": 0.0, "rest": 0.0} | took] * len(after.parts)


@pytest.fixture
def vllm(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=object, SamplingParams=object))
    monkeypatch.delitem(sys.modules, "peer_vllm", raising=False)
    from bench.peers import peer_vllm

    yield peer_vllm
    sys.modules.pop("peer_vllm", None)


def test_vllm_steps_by_part(vllm):
    clock = Clock()
    passes = Passes(clock)
    runner = SimpleNamespace(_model_forward=clock.work, model=SimpleNamespace(compute_logits=clock.work),
                             drafter=SimpleNamespace(propose=clock.work))
    llm = SimpleNamespace(llm_engine=SimpleNamespace(model_executor=SimpleNamespace(
        driver_worker=SimpleNamespace(worker=SimpleNamespace(model_runner=runner)))))
    vllm.watch_runner(vllm.runner_of(llm), True, passes)
    for _ in range(3):
        runner._model_forward(4.0), runner.model.compute_logits(2.0), runner.drafter.propose(1.0), clock.work(0.5)
    assert passes.taken() == [{"step": 7.5, VERIFY: 6.0, DRAFT: 1.0}]


def test_a_vllm_that_cannot_be_watched_says_why(vllm):
    passes, elsewhere = Passes(), SimpleNamespace(llm_engine=SimpleNamespace(model_executor=None))
    with pytest.raises(NotImplementedError, match="cannot be reached in this process: .*driver_worker"):
        vllm.runner_of(elsewhere)
    other = SimpleNamespace(model=SimpleNamespace(compute_logits=len))
    with pytest.raises(NotImplementedError, match="otherwise than the runner of vLLM's V1"):
        vllm.watch_runner(other, False, passes)
    undrafted = SimpleNamespace(_model_forward=len, model=SimpleNamespace(compute_logits=len))
    with pytest.raises(NotImplementedError):
        vllm.watch_runner(undrafted, True, passes)
    assert undrafted._model_forward is len


SERVER = """#!{python}
import http.server, json, sys
print("system_info: n_threads = 2 | CPU : AVX512 = 1 | AMX_INT8 = 1 |", flush=True)
options = dict(zip(sys.argv[1:], sys.argv[2:]))

class Handler(http.server.BaseHTTPRequestHandler):
    def answer(self, value):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(value).encode())

    def do_GET(self):
        self.answer("ok")

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        drafts = {{"draft_n_accepted": 3}} if options.get("--spec-draft-n-max") == "3" else {{}}
        self.answer({{"tokens_predicted": asked["n_predict"], "timings": {{"predicted_ms": 180.0}} | drafts}})

http.server.HTTPServer(("127.0.0.1", int(options["--port"])), Handler).serve_forever()
"""


@pytest.mark.parametrize("mode, steps, ms", [(job.BASELINE, 9, 20.0), (job.DFLASH, 6, 30.0)])
def test_llama_tells_whole_steps(monkeypatch, tmp_path, mode, steps, ms):
    from bench.peers import peer_llama

    server, ends = tmp_path / "llama-server", []
    server.write_text(SERVER.format(python=sys.executable))
    server.chmod(0o755)
    monkeypatch.setattr(peer_llama, "SERVER", server)
    monkeypatch.setattr(peer_llama, "HOME", tmp_path)
    monkeypatch.setattr(peer_llama.atexit, "register", ends.append)
    answering, versions, watch = peer_llama.load(a_job(mode, "m", "d"))
    try:
        row = sums.parts_row(("llama", mode, 2), [answering(job.Question([[1]], 10, watched=True))])
        assert watch is None and (row["steps"], row["step_ms"], row["verify_ms"]) == (steps, ms, None)
        assert "an answer only" in row["whole"] and answering(job.Question([[1]], 10)).parts == []
        assert versions["llama.cpp"] == "CPU : AVX512 = 1 | AMX_INT8 = 1"
    finally:
        for end in ends:
            end()
