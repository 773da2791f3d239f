"""A decoder in a thread of its own, which takes and cancels requests from any thread at any time."""

import queue
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import nullcontext
from functools import partial
from typing import NamedTuple, cast

import torch

from ..inputs import said
from ..loop import Decoder
from ..requests import Event
from .job import Job

_TRIES = 2  # steps in a row that may raise: what failed once may be a request that has ended by it


class Load(NamedTuple):
    """What an engine has to do. cache: the share of its pages that are taken."""

    running: int
    waiting: int
    cache: float


class Engine:
    """Decodes jobs. The thread starts with the first of them; a step never waits for whoever reads the answers."""

    def __init__(self, decoder: Decoder):
        self._decoder = decoder
        self._orders: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._jobs: dict[int, Job] = {}  # that the decoder has
        self._waiting: deque[Job] = deque()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self.closed = False

    def submit(self, job: Job) -> None:
        """Queues a job. Raises RuntimeError once the engine is closed."""
        self._order(partial(self._waiting.append, job))

    def cancel(self, job: Job) -> None:
        """Ends a job before the next step; does nothing for one that has ended."""
        self._orders.put(partial(self._drop, job))

    def call(self, work: Callable[[], None]) -> None:
        """Runs work() in the thread, between two steps, and waits for it. Raises what it raises."""
        done: Future[None] = Future()

        def order() -> None:
            try:
                work()
                done.set_result(None)
            except BaseException as error:
                done.set_exception(error)

        self._order(order)
        done.result()

    def load(self) -> Load:
        pool = self._decoder.pool
        return Load(len(self._jobs), len(self._waiting) + self._orders.qsize(), 1 - pool.free_pages / pool.num_pages)

    def _order(self, order: Callable[[], None]) -> None:
        with self._lock:
            if self.closed:
                raise RuntimeError("LLM: it must be open to generate; got one that is closed")
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="dflash-engine", daemon=True)
                self._thread.start()
            self._orders.put(order)

    def close(self) -> None:
        """Cancels what runs, and waits for the thread to end."""
        with self._lock:
            self.closed = True
            thread = self._thread
        self._orders.put(None)
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    # ---- in the thread ----

    def _run(self) -> None:
        """The thread. However it ends, nobody waits for it afterwards."""
        device, why = self._decoder.target.device, "the LLM was closed before the answer ended"
        try:
            with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
                self._decode()
        except BaseException as error:
            why = f"the decoder's thread failed: {said(error)}"
        with self._lock:
            self.closed = True
        while not self._orders.empty():
            if order := self._orders.get():
                order()
        self._fail(why)

    def _decode(self) -> None:
        failed = 0
        while self._obey():
            try:
                self._feed()
                for event in self._decoder.step():
                    self._tell(event)
                failed = 0
            except BaseException as error:  # also SystemExit, which a caller's grammar may raise
                failed += 1
                if failed == _TRIES:
                    self._fail(f"the decoder failed: {said(error)}")
                    failed = 0

    def _obey(self) -> bool:
        """Carries out the orders, and waits for one while there is nothing to do. False at the end."""
        while True:
            try:
                order = self._orders.get(block=not self._jobs and not self._waiting)
            except queue.Empty:
                return True
            if order is None:
                return False
            order()

    def _feed(self) -> None:
        while self._waiting and len(self._jobs) < self._decoder.max_batch:
            job = self._waiting.popleft()
            try:
                self._decoder.submit(job.request)
                self._jobs[id(job)] = job
            except Exception as error:  # a warning that the caller has made an error
                job.fail(said(error))

    def _tell(self, event: Event) -> None:
        key = cast(int, event.id)
        job = self._jobs[key]
        if event.finish:
            del self._jobs[key]
        try:
            enough = job.take(event)
        except Exception as error:  # of the tokenizer: the fault of this answer alone
            job.fail(said(error))
            enough = True
        if enough and not event.finish:
            self._decoder.cancel(key)

    def _drop(self, job: Job) -> None:
        job.ended = True
        if id(job) in self._jobs:
            self._decoder.cancel(id(job))
        elif job in self._waiting:
            self._waiting.remove(job)
            job.take(Event(id(job), [], "cancelled"))

    def _fail(self, why: str) -> None:
        """Ends every job, and leaves the decoder as new."""
        jobs = [*self._jobs.values(), *self._waiting]
        self._jobs.clear()
        self._waiting.clear()
        self._decoder.close()
        for job in jobs:
            job.fail(why)
