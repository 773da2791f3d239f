"""/metrics, in Prometheus' text format, under the names of vLLM's server."""

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)

from dflash_decode import LLM, Chunk, Completion

CONTENT_TYPE = CONTENT_TYPE_LATEST

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)
_REASONS = {"cancelled": "abort"}


class Metrics:
    """name: the model's name."""

    def __init__(self, llm: LLM, name: str):
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._labels = {"model_name": name, "engine": "0"}
        for gauge, text, value in (
                ("num_requests_running", "Requests that are decoded.", lambda: llm.workload().running),
                ("num_requests_waiting", "Requests that wait.", lambda: llm.workload().waiting),
                ("kv_cache_usage_perc", "The share of the KV cache that is taken, from 0 to 1.",
                 lambda: llm.workload().cache)):
            Gauge(f"vllm:{gauge}", text, [*self._labels], registry=self.registry).labels(
                **self._labels).set_function(value)
        self._prompt = self._counter("prompt_tokens", "Tokens of prompts.")
        self._asked = self._counter("prefix_cache_queries", "Tokens of prompts, each of which could be cached.")
        self._cached = self._counter("prefix_cache_hits", "Tokens of prompts that were cached.")
        self._generated = self._counter("generation_tokens", "Tokens of answers.")
        self._drafts = self._counter("spec_decode_num_drafts", "Verified blocks with drafts.")
        self._drafted = self._counter("spec_decode_num_draft_tokens", "Verified drafts.")
        self._accepted = self._counter("spec_decode_num_accepted_tokens", "Accepted drafts.")
        self._by_position = Counter("vllm:spec_decode_num_accepted_tokens_per_pos", "Accepted drafts by position.",
                                    [*self._labels, "position"], registry=self.registry)
        self._ended = Counter("vllm:request_success", "Ended requests.", [*self._labels, "finished_reason"],
                              registry=self.registry)
        self._first = self._histogram("time_to_first_token_seconds", "Seconds to the first token.", _SECONDS)
        self._each = self._histogram("request_time_per_output_token_seconds", "A request's mean seconds for each token "
                                     "after the first.", _TOKEN_SECONDS)
        self._whole = self._histogram("e2e_request_latency_seconds", "Seconds to the end.", _SECONDS)
        self._prompts = self._histogram("request_prompt_tokens", "Tokens of a prompt.", _TOKENS)
        self._answers = self._histogram("request_generation_tokens", "Tokens of an answer.", _TOKENS)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(f"vllm:{name}", text, [*self._labels], registry=self.registry).labels(**self._labels)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"vllm:{name}", text, [*self._labels], registry=self.registry, buckets=buckets).labels(
            **self._labels)

    def took(self, chunk: Chunk) -> None:
        """Counts a piece of an answer."""
        self._generated.inc(len(chunk.token_ids))
        if chunk.completion is not None:
            self._end(chunk.completion)

    def failed(self) -> None:
        self._ended.labels(**self._labels, finished_reason="error").inc()

    def _end(self, found: Completion) -> None:
        tokens = len(found.token_ids)
        self._ended.labels(**self._labels, finished_reason=_REASONS.get(found.finish_reason, found.finish_reason)).inc()
        if not tokens:  # it left before its prompt was read
            return
        self._prompt.inc(len(found.prompt_token_ids))
        self._asked.inc(len(found.prompt_token_ids))
        self._cached.inc(found.cached_tokens)
        self._prompts.observe(len(found.prompt_token_ids))
        self._answers.observe(tokens)
        self._first.observe(found.time_to_first_token)
        self._whole.observe(found.seconds)
        if tokens > 1:
            self._each.observe((found.seconds - found.time_to_first_token) / (tokens - 1))
        accepted = [n - 1 for n, width in zip(found.steps, found.widths, strict=True) if width > 1]
        self._drafts.inc(len(accepted))
        self._drafted.inc(sum(found.widths) - len(found.widths))
        self._accepted.inc(sum(accepted))
        for position in range(max(accepted, default=0)):
            self._by_position.labels(**self._labels, position=str(position)).inc(sum(n > position for n in accepted))

    def text(self) -> bytes:
        return generate_latest(self.registry)
