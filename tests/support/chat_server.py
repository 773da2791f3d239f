"""A chat server for tests: it imitates the streamed API and /metrics, and misbehaves as it is told."""

import json
import threading
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

VLLM = """# HELP vllm:spec_decode_num_drafts_total Number of spec decoding drafts.
# TYPE vllm:spec_decode_num_drafts_total counter
vllm:spec_decode_num_drafts_total{{engine="0",model_name="m"}} {drafts}
vllm:spec_decode_num_drafts_created{{engine="0",model_name="m"}} 1.7e+09
vllm:spec_decode_num_accepted_tokens_total{{engine="0",model_name="m"}} {accepted}
vllm:spec_decode_num_accepted_tokens_per_pos_total{{engine="0",model_name="m",position="0"}} {drafts}
vllm:spec_decode_num_accepted_tokens_per_pos_total{{engine="0",model_name="m",position="1"}} {rest}
"""
SGLANG = """sglang:num_requests_total{{model_name="m"}} {requests}
sglang:generation_tokens_total{{model_name="m"}} {tokens}
sglang:spec_verify_calls_total{{model_name="m"}} {drafts}
sglang:spec_accept_length{{model_name="m"}} 9.5
"""
GAUGE = 'sglang:spec_accept_length{{model_name="m",tp_rank="0"}} 2.75\n'


class FakeChat:
    """answer(messages) -> text; a token a character. The first comes from the prompt, then four with every draft,
    three of them drafted; spurned: drafts of which none was. faults: what to do to the next requests, "drop", "half",
    "silent" (until this server ends), a status, or None. wait(request) is called after each piece of an answer."""

    def __init__(self, metrics: str = "", wait: Callable[[dict], object] = lambda request: None, faults=(),
                 usage: bool = True):
        self.metrics, self.wait, self.faults, self.usage = metrics, wait, list(faults), usage
        self.over = threading.Event()
        self.lock, self.running, self.most, self.seen = threading.Lock(), 0, 0, []
        self.requests = self.tokens = self.drafts = self.spurned = 0
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_args):
                pass

            def do_GET(self):
                fake.get(self)

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with fake.lock:
                    fake.running += 1
                    fake.most = max(fake.most, fake.running)
                    fake.seen.append(body | {"authorization": self.headers.get("Authorization")})
                    fault = fake.faults.pop(0) if fake.faults else None
                with suppress(BrokenPipeError, ConnectionResetError):
                    fake.post(self, body, fault)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_error):
        self.over.set()
        self.server.shutdown()
        self.server.server_close()

    def answer(self, messages) -> str:
        return f"answer {len(messages)} to {messages[-1]['content']}"

    def get(self, handler):
        if handler.path == "/v1/models":
            return reply(handler, 200, json.dumps({"data": [{"id": "the-model"}]}))
        if handler.path == "/metrics" and self.metrics:
            return reply(handler, 200, self.metrics.format(
                drafts=self.drafts, accepted=3 * (self.drafts - self.spurned), rest=self.drafts / 2, tokens=self.tokens,
                requests=self.requests))
        return reply(handler, 404, '{"detail": "Not Found"}')

    def leave(self):
        """Before the client learns that its answer is over, as it may ask again at once."""
        with self.lock:
            self.running -= 1

    def post(self, handler, body, fault):
        if fault is not None:
            self.leave()
        if isinstance(fault, int):
            return reply(handler, fault, json.dumps({"error": {"message": f"no, {fault}", "type": "x"}}))
        if fault == "silent":
            self.over.wait()
        if fault in ("drop", "silent"):
            handler.close_connection = True
            return handler.connection.close()
        text = self.answer(body["messages"])[:body["max_tokens"]]
        handler.send_response(200)
        handler.send_header("Content-Type", "text/event-stream")
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        pieces = [text[i:i + 4] for i in range(0, len(text), 4)]
        for piece in pieces[:1] if fault == "half" else pieces:
            event(handler, {"choices": [{"delta": {"content": piece}, "finish_reason": None}]})
            self.wait(body)
        if fault == "half":
            handler.close_connection = True
            return handler.connection.close()
        event(handler, {"choices": [{"delta": {}, "finish_reason": "stop"}]})
        self.leave()
        with self.lock:
            self.requests, self.tokens = self.requests + 1, self.tokens + len(text)
            self.drafts += (len(text) - 1) // 4
        if self.usage:
            event(handler, {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": len(text)}})
        chunk(handler, b": a comment\n\ndata: [DONE]\n\n")
        chunk(handler, b"")


def event(handler, value):
    chunk(handler, b"data: " + json.dumps(value).encode() + b"\n\n")


def chunk(handler, data: bytes):
    handler.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
    handler.wfile.flush()


def reply(handler, status: int, text: str):
    data = text.encode()
    handler.send_response(status)
    handler.send_header("Content-Length", str(len(data)))
    handler.end_headers()
    handler.wfile.write(data)
