"""The model cards' protocol asked of a server: what is sent, what is read from its metrics, what goes wrong there."""

import io
import threading
import time

import pytest
from chat_server import GAUGE, SGLANG, VLLM, FakeChat

pytest.importorskip("rich")

from protocol_runs import ONE, TWO, measured

from dflash_decode import chat
from dflash_decode.answerers import Server
from dflash_decode.bench import Prompt
from dflash_decode.served_metrics import Drafting, drafting


def served(fake, max_new_tokens=100, **options):
    return Server(chat.ChatServer(fake.url, timeout=5.0), max_new_tokens, {}, **({"patience": 0.01} | options))


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
    with FakeChat(pause=0.1) as fake:
        measured(served(fake), prompts, [3], tmp_path / "j")
    assert fake.most == 3


def test_what_may_go_well_the_next_time_is_sent_again(tmp_path):
    with FakeChat(faults=[None, "drop", "half", 503, None, 429]) as fake:
        row = measured(served(fake), ONE, [1], tmp_path / "j")[0]
    assert row["prompts"] == 4 and row["retries"] == 4 and len(fake.seen) == 1 + 4 + 4


def test_a_server_that_is_silent_for_too_long(tmp_path):
    with FakeChat(faults=["silent"]) as fake:
        server = chat.ChatServer(fake.url, timeout=0.2)
        with pytest.raises(chat.Dropped, match="timed out"):
            server.chat([{"role": "user", "content": "x"}], 5)
        assert server.chat([{"role": "user", "content": "x"}], 6) == chat.Reply("answer", 6, 7, "stop")


def test_slow_is_not_silent():
    with FakeChat(pause=0.1) as fake:
        assert chat.ChatServer(fake.url, timeout=0.3).chat([{"role": "user", "content": "x"}], 99).tokens == 13


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
    with FakeChat(pause=1.0) as fake:
        server = served(fake, max_new_tokens=20)
        answers = server._stream(ONE, 4)
        threading.Timer(0.3, lambda: server.chat.abort()).start()
        began = time.monotonic()
        with pytest.raises(chat.Dropped):
            next(answers)
        assert time.monotonic() - began < 1.0
        assert not any(t.is_alive() for t in threading.enumerate() if t.name.endswith("(_work)"))


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
