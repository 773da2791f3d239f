"""The model cards' protocol asked of a server: what is sent, what is read from its metrics, what goes wrong there."""

import io
import json
import threading

import pytest

from tests.support.chat_server import GAUGE, SGLANG, VLLM, FakeChat
from tests.support.clocks import Clock

pytest.importorskip("rich")

from dflash_bench import chat
from dflash_bench.answerers import Server
from dflash_bench.decode import Prompt
from dflash_bench.metrics import Drafting, drafting
from tests.support.protocol_runs import ONE, TWO, measured

HANGS = 60.0  # seconds after which a test that waits for what does not come fails


def served(fake, max_tokens=100, **options):
    return Server(chat.ChatServer(fake.url, timeout=10 * HANGS), max_tokens, {}, **({"patience": 0.0} | options))


# ---- a server ------------------------------------------------------------------------------------------------------


def test_all_turns_with_the_answers_in_the_history(tmp_path):
    with FakeChat(VLLM) as fake:
        rows = measured(served(fake), TWO, [1], tmp_path / "j")
    asked = [r["messages"] for r in fake.seen[1:]]  # the first is the warm-up
    assert [m[-1]["content"] for m in asked] == [f"{t} {i}" for i in range(3) for t in ("first", "second")]
    assert asked[1] == [{"role": "user", "content": "first 0"}, {"role": "assistant", "content": "answer 1 to first 0"},
                        {"role": "user", "content": "second 0"}]
    assert all(r["temperature"] == 0.0 and r["max_tokens"] == 100 and r["model"] == "the-model" and r["stream"]
               for r in fake.seen[1:])
    assert [(r["task"], r["prompts"], r["turns"], r["tokens"]) for r in rows] == [("mt_bench", 3, 6, 6 * 19 + 3)]


def test_throughput_and_acceptance_of_vllm(tmp_path):
    with FakeChat(VLLM) as fake:
        fake.drafts = fake.spurned = 1000  # what was counted before does not count
        row, other = measured(served(fake), ONE, [1, 4], tmp_path / "j")
    assert row["acceptance_length"] == other["acceptance_length"] == 4.0
    assert row["acceptance_from"] == "vllm counters" and row["accepted_by_position"] == [1.0, 0.5]
    assert row["tokens"] == 4 * len("answer 1 to question 0") and row["runs"] == 1 and row["retries"] == 0
    assert row["tokens_per_s"] == pytest.approx(row["tokens"] / row["seconds"], rel=0.05)


@pytest.mark.parametrize("metrics, length, source", [
    (SGLANG, 1 + (4 * 22 - 4 - 4 * 5) / (4 * 5), "sglang counters"), (GAUGE, 2.75, "sglang gauge, its last interval"),
    ("", None, "not reported"), ("up 1\n", None, "not reported")])
def test_acceptance_of_others(tmp_path, metrics, length, source):
    with FakeChat(metrics) as fake:
        row = measured(served(fake), ONE, [2], tmp_path / "j")[0]
    assert row["acceptance_length"] == (None if length is None else pytest.approx(length, abs=1e-4))
    assert row["acceptance_from"] == source


def test_concurrency_is_what_was_asked_for(tmp_path):
    prompts = [Prompt("t", str(i), ("x",)) for i in range(9)]
    three = threading.Barrier(3)  # nobody's answer goes on before three are under way

    def wait(request):
        if request["max_tokens"] == 100:  # the warm-up is alone
            three.wait(HANGS)

    with FakeChat(wait=wait) as fake:
        measured(served(fake, tries=1), prompts, [3], tmp_path / "j")
    assert fake.most == 3


def test_what_may_go_well_the_next_time_is_sent_again(tmp_path):
    with FakeChat(faults=[None, "drop", "half", 503, None, 429]) as fake:
        row = measured(served(fake), ONE, [1], tmp_path / "j")[0]
    assert row["prompts"] == 4 and row["retries"] == 4 and len(fake.seen) == 1 + 4 + 4


def test_a_server_that_is_silent_for_too_long(tmp_path):
    """It never answers, however long the machine takes to find out."""
    with FakeChat(faults=["silent"]) as fake:
        with pytest.raises(chat.Dropped, match="timed out"):
            chat.ChatServer(fake.url, "m", timeout=0.1).chat([{"role": "user", "content": "x"}], 5)
        patient = chat.ChatServer(fake.url, timeout=HANGS)
        assert patient.chat([{"role": "user", "content": "x"}], 6) == chat.Reply("answer", 6, 7, "stop")


@pytest.mark.parametrize("pause", [0.1, 0.4])
def test_slow_is_not_silent(monkeypatch, pause):
    """A timeout of 0.3 s is for the wait before each line, not for the answer: on a clock of the test's own."""
    clock, events = Clock(), [{"choices": [{"delta": {"content": c}}]} for c in "answer"]
    events += [{"choices": [{"finish_reason": "stop"}]}, {"usage": {"completion_tokens": 6}}]
    lines = iter([b"data: " + json.dumps(event).encode() + b"\n" for event in events])

    class Connection:
        status = 200

        def __init__(self, host, port, timeout):
            self.timeout, self.sock = timeout, self

        def connect(self, *_args):
            pass

        request = close = connect

        def getresponse(self):
            return self

        def readline(self):
            clock.work(min(pause, self.timeout))
            if pause > self.timeout:
                raise TimeoutError("timed out")
            return next(lines, b"")

    server = chat.ChatServer("http://x", "m", timeout=0.3)
    monkeypatch.setattr(server, "_connect", Connection)
    if pause > 0.3:
        with pytest.raises(chat.Dropped, match="timed out"):
            server.chat([], 9)
    else:
        assert server.chat([], 9) == chat.Reply("answer", 6, None, "stop") and clock.now > 0.8


@pytest.mark.parametrize("fault, words", [(400, "400 Bad Request: no, 400"), (401, "401 Unauthorized: no, 401")])
def test_a_refusal_ends_the_run_and_keeps_what_is_finished(tmp_path, fault, words):
    with FakeChat(faults=[None, None, fault]) as fake:
        with pytest.raises(chat.ServerError, match=words):
            measured(served(fake), ONE, [1], tmp_path / "j")
        assert len(fake.seen) == 3
        rows = measured(served(fake), ONE, [1], tmp_path / "j")
    assert [r["messages"][-1]["content"] for r in fake.seen[4:]] == ["question 1", "question 2", "question 3"]
    assert rows[0]["prompts"] == 4 and rows[0]["runs"] == 2


def test_a_server_that_stays_away_is_an_error(tmp_path):
    with FakeChat(faults=[None, *["drop"] * 3]) as fake, pytest.raises(chat.Dropped):
        measured(served(fake, tries=3), ONE, [1], tmp_path / "j")
    with pytest.raises(chat.Dropped, match="refused"):
        chat.ChatServer(fake.url)


def test_tokens_that_nobody_counted(tmp_path):
    with FakeChat(usage=False) as fake, pytest.raises(chat.ServerError, match="completion_tokens"):
        measured(served(fake), ONE, [1], tmp_path / "j")


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://x", "http://"])
def test_urls(url):
    with pytest.raises(chat.ServerError, match="--base-url must be"):
        chat.ChatServer(url)


def test_a_url_with_or_without_v1_a_key_and_more_fields():
    with FakeChat() as fake:
        server = chat.ChatServer(f"{fake.url}/v1/", "named", api_key="k", extra={"top_k": 1})
        assert server.url == fake.url
        server.chat([{"role": "user", "content": "x"}], 3)
    assert (fake.seen[0]["model"], fake.seen[0]["authorization"], fake.seen[0]["top_k"]) == ("named", "Bearer k", 1)


def test_stopping_does_not_wait_for_streams(tmp_path):
    """Four answers that stay where they are are broken off, and their threads end."""
    streaming, go = threading.Barrier(5), threading.Event()

    def wait(request):
        if not go.is_set():
            streaming.wait(HANGS)
            go.wait(HANGS)

    with FakeChat(wait=wait) as fake:
        server = served(fake, max_tokens=20, tries=1)
        answers = server._stream(ONE, 4)

        def abort():
            streaming.wait(HANGS)
            server.chat.abort()

        threading.Thread(target=abort).start()
        with pytest.raises(chat.Dropped):
            next(answers)
        assert fake.requests == 0 and working() == []
        go.set()


def test_one_refusal_breaks_the_other_answers_off():
    go = threading.Event()
    with FakeChat(wait=lambda request: go.wait(HANGS), faults=[400]) as fake:
        with pytest.raises(chat.ServerError, match="no, 400"):
            next(served(fake, tries=1)._stream(ONE, 4))
        assert fake.requests == 0 and working() == []
        go.set()


def working():
    return [t for t in threading.enumerate() if t.name.endswith("(_work)")]


# ---- metrics -------------------------------------------------------------------------------------------------------


def test_counters_of_all_engines_add_up():
    text = "\n".join(f'vllm:spec_decode_num_{name}{{engine="{e}"{more}}} {value * (e + 1)}' for e in (0, 1)
                     for name, more, value in (("drafts_total", "", 10), ("accepted_tokens_total", "", 15),
                                               ("accepted_tokens_per_pos_total", ',position="0"', 9),
                                               ("accepted_tokens_per_pos_total", ',position="10"', 6)))
    assert drafting(text) == Drafting("vllm counters", 30.0, 45.0, (27.0, 18.0))
    assert drafting("llamacpp:spec_decode_num_drafts 4\nllamacpp:spec_decode_num_accepted_tokens 6").length == 2.5
    assert drafting("nonsense {\nvllm:spec_decode_num_drafts_total{} x\n") is None


def test_nothing_drafted_is_no_acceptance_length():
    assert Drafting("vllm counters").length is None and Drafting("g", gauge=0.0).length is None


def test_a_stream_that_breaks_off_before_its_usage_is_dropped():
    """It may go well the next time; a stream that is whole and has no usage never will."""
    finished = b'data: {"choices": [{"delta": {"content": "x"}, "finish_reason": "stop"}]}\n\n'
    asked = object.__new__(chat.ChatServer)
    asked.url = "http://here"
    with pytest.raises(chat.Dropped, match="broke off after 1 characters"):
        asked._reply(io.BytesIO(finished))
    with pytest.raises(chat.ServerError, match="expected usage.completion_tokens") as found:
        asked._reply(io.BytesIO(finished + b"data: [DONE]\n\n"))
    assert not isinstance(found.value, chat.Dropped)
