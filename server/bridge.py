"""The only crossing between asyncio and the engine's thread, and the engine's supervisor.

Knows no HTTP. All its state changes on the event loop; the engine thread steps, and posts what came of it:

    loop:    open(submits) -> Ticket ... engine.submit            cancel(ticket) ... engine.cancel
    thread:  wait_for_work, step ---- call_soon_threadsafe ----> _deliver -> each Ticket's mailbox

Every id that was opened gets exactly one Finished or Failed, also when the engine dies or hangs.
"""

import asyncio
import contextlib
import functools
import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from loractl.adapters.errors import EngineFailure, LoractlError, Overloaded, Unreachable
from loractl.adapters.reference import Digest
from loractl.server.engine.messages import (
    AdapterUse,
    Cancel,
    Constraint,
    Event,
    Failed,
    Finished,
    RequestId,
    Submit,
    Token,
)
from loractl.server.engine.stats import EngineStats, LoadRecord, StepRecord, StepResult
from loractl.server.interruption import StepHung, interrupt

log = logging.getLogger("loractl.server.bridge")

_STATE_HINTS = {"restarting": "it restarts by itself within seconds", "hung": "it is being restarted"}

EngineState = Literal["starting", "running", "restarting", "hung", "dead", "stopped"]


class EngineLike(Protocol):
    """The part of `loractl.server.engine.engine.Engine` that the server uses."""

    @property
    def max_model_len(self) -> int: ...
    def check_constraint(self, constraint: Constraint) -> None: ...
    def submit(self, request: Submit) -> None: ...
    def cancel(self, request: Cancel) -> None: ...
    def wait_for_work(self, timeout_s: float) -> bool: ...
    def step(self) -> StepResult: ...
    def stats(self) -> EngineStats: ...
    def device_memory(self) -> Mapping[str, int]: ...
    def prefetch(self, use: AdapterUse) -> None: ...
    def pin(self, digest: Digest) -> None: ...
    def unpin(self, digest: Digest) -> None: ...
    def unload(self, digest: Digest) -> None: ...
    def close(self) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class BridgeLimits:
    """When the engine counts as hung, and how often it may be built anew."""

    stall_s: float = 10.0
    """A step that runs longer turns readiness off; it comes back when the step ends."""
    hang_s: float = 30.0
    """A step that runs longer is interrupted, and the requests that wait for it fail."""
    max_restarts: int = 3
    restart_window_s: float = 600.0
    max_open: int = 20_000
    """Sequences that may be open at once, streaming or queued."""


class Ticket:
    """One HTTP request's sequences (`n` choices, several prompts) and the events that have come for them."""

    def __init__(self, ids: Sequence[RequestId]) -> None:
        self.ids = tuple(ids)
        self.index = {request_id: place for place, request_id in enumerate(ids)}
        self._open = set(ids)
        self._mailbox: list[Event] = []
        self._arrived = asyncio.Event()

    @property
    def is_ended(self) -> bool:
        return not self._open

    @property
    def open_ids(self) -> frozenset[RequestId]:
        return frozenset(self._open)

    async def events(self) -> AsyncIterator[list[Event]]:
        """Yield what has come since the last time, until every sequence has ended.

        A reader that is slow gets larger batches; what waits is bounded by the sequences' lengths.
        """
        while True:
            if not self._mailbox and self._open:
                self._arrived.clear()
                await self._arrived.wait()
            batch, self._mailbox = self._mailbox, []
            if batch:
                yield batch
            if not self._open and not self._mailbox:
                return

    def put(self, event: Event) -> bool:
        """Take an event unless its sequence has ended; True for the event that ends it."""
        if event.id not in self._open:
            return False
        ends = not isinstance(event, Token)
        if ends:
            self._open.discard(event.id)
        self._mailbox.append(event)
        self._arrived.set()
        return ends


class Bridge:
    """Owns the engine's thread. Every method but the thread's own is for the event loop."""

    def __init__(
        self,
        make_engine: Callable[[], EngineLike],
        *,
        limits: BridgeLimits | None = None,
        on_step: Callable[[StepRecord], None] = lambda record: None,
        on_load: Callable[[LoadRecord], None] = lambda record: None,
    ) -> None:
        self.limits = limits or BridgeLimits()
        self.state: EngineState = "starting"
        self.num_restarts = 0
        self.num_hangs = 0
        self.last_step_at: float | None = None
        self.max_model_len = 0
        """Of the engine that runs or ran last."""
        self._make_engine = make_engine
        self._on_step = on_step
        self._on_load = on_load
        self._engine: EngineLike | None = None
        self._tickets: dict[RequestId, Ticket] = {}
        self._numbers = itertools.count(1)
        self._restarts: deque[float] = deque()
        self._stopping = threading.Event()
        # Written by the engine thread, read by the loop: one reference each, so no lock.
        self._step_started_at: float | None = None
        self._thread: threading.Thread | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def start(self) -> None:
        """Start the engine's thread, which builds the engine first; returns when it runs or cannot."""
        self._loop = asyncio.get_running_loop()
        started: asyncio.Future[None] = self._loop.create_future()
        self._thread = threading.Thread(target=self._run, args=(started,), name="engine", daemon=True)
        self._thread.start()
        await started
        self._watcher = asyncio.create_task(self._watch())

    async def stop(self) -> None:
        """End the thread after its current step; what is still open fails as draining."""
        self._stopping.set()
        self.state = "stopped"
        if self._watcher is not None:
            self._watcher.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watcher
        self.fail_all(EngineFailure("the server stopped"))
        if self._thread is not None:
            # A hung step must not keep the process: the thread is a daemon.
            await asyncio.to_thread(self._thread.join, 5.0)

    @property
    def is_ready(self) -> bool:
        """Whether a request submitted now would run."""
        return self.state == "running" and not self._is_hung(min(self.limits.stall_s, self.limits.hang_s))

    @property
    def is_alive(self) -> bool:
        """Whether a restart of the process would not help; a step that nothing interrupts is given twice its time."""
        return self.state != "dead" and not self._is_hung(2 * self.limits.hang_s)

    @property
    def num_open(self) -> int:
        return len(self._tickets)

    @property
    def engine(self) -> EngineLike:
        """The running engine; raises Unreachable (503) where there is none."""
        if self._engine is None or self.state in {"hung", "dead", "stopped"}:
            raise Unreachable(
                f"the engine is {self.state}",
                hint=_STATE_HINTS.get(self.state, "see the server's log"),
                retry_after_s=5,
            )
        return self._engine

    @property
    def stats(self) -> EngineStats:
        """The engine's own figures; without an engine nothing runs, waits or is resident, and that is told too."""
        engine = self._engine
        return EngineStats() if engine is None else engine.stats()

    @property
    def device_memory(self) -> Mapping[str, int]:
        """Bytes that the engine holds on its device, by what for; none without an engine."""
        engine = self._engine
        return {} if engine is None else engine.device_memory()

    def new_id(self) -> RequestId:
        """An id of our own making: nothing that a client sends ever becomes a key."""
        return RequestId(f"r{next(self._numbers)}")

    def open(self, submits: Sequence[Submit]) -> Ticket:
        """Queue all of them or none. Raises Overloaded, BadRequest or Unreachable."""
        engine = self.engine
        if len(self._tickets) + len(submits) > self.limits.max_open:
            raise Overloaded("too many requests are open", hint="try again soon", retry_after_s=1)
        ticket = Ticket([submit.id for submit in submits])
        accepted: list[RequestId] = []
        try:
            for submit in submits:
                engine.submit(submit)
                accepted.append(submit.id)
        except LoractlError:
            for request_id in accepted:
                engine.cancel(Cancel(id=request_id))
            raise
        self._tickets.update(dict.fromkeys(accepted, ticket))
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Stop what still runs for this ticket; its ids leave the books when the engine says so."""
        if self._engine is None:
            return
        for request_id in ticket.open_ids:
            self._engine.cancel(Cancel(id=request_id))

    def _deliver(self, result: StepResult) -> None:
        self.last_step_at = time.time()
        for event in result.events:
            ticket = self._tickets.get(event.id)
            if ticket is not None and ticket.put(event):
                del self._tickets[event.id]
        if result.record is not None:
            self._on_step(result.record)
        for load in result.loads:
            self._on_load(load)

    def fail_all(self, error: LoractlError) -> None:
        """End everything that is open with this error."""
        for request_id, ticket in list(self._tickets.items()):
            ticket.put(Failed(id=request_id, error=error))
        self._tickets.clear()

    # The supervisor. `_run` is the thread; `_adopt`, `_lost` and `_gave_up` are its messages, run on the loop.

    def _run(self, started: "asyncio.Future[None]") -> None:
        try:
            self._supervise(started)
        except StepHung:  # a step failed by itself as it was interrupted: the process has to be restarted
            self._post(self._gave_up)

    def _supervise(self, started: "asyncio.Future[None]") -> None:
        try:
            engine = self._make_engine()
        except LoractlError as error:
            refusal = error
            self._post(lambda: started.set_exception(refusal))
            return
        self._post(lambda: self._adopt(engine))
        self._post(lambda: started.set_result(None))
        while not self._stopping.is_set():
            try:
                self._step_until_stopped(engine)
            except (Exception, StepHung) as error:
                log.error("the engine's step failed", exc_info=error)
                self._step_started_at = None
                self._post(self._lost)
                replacement = self._rebuild(engine)
                if replacement is None:
                    return
                engine = replacement
        engine.close()

    def _step_until_stopped(self, engine: EngineLike) -> None:
        while not self._stopping.is_set():
            if not engine.wait_for_work(0.2):
                continue
            self._step_started_at = time.monotonic()
            result = engine.step()
            self._step_started_at = None
            if result.events or result.loads or result.record is not None:
                self._post(functools.partial(self._deliver, result))

    def _rebuild(self, broken: EngineLike) -> EngineLike | None:
        now = time.monotonic()
        while self._restarts and now - self._restarts[0] > self.limits.restart_window_s:
            self._restarts.popleft()
        if len(self._restarts) >= self.limits.max_restarts:
            log.error("the engine failed %d times in %g s", len(self._restarts) + 1, self.limits.restart_window_s)
            self._post(self._gave_up)
            return None
        self._restarts.append(now)
        try:
            broken.close()
            engine = self._make_engine()
        except Exception as error:
            log.error("the engine could not be rebuilt", exc_info=error)
            self._post(self._gave_up)
            return None
        self._post(lambda: self._adopt(engine))
        return engine

    def _adopt(self, engine: EngineLike) -> None:
        self._engine = engine
        self.max_model_len = engine.max_model_len
        if self.state != "stopped":
            self.state = "running"

    def _lost(self) -> None:
        self._engine = None
        self.num_restarts += 1
        if self.state != "stopped":
            self.state = "restarting"
        self.fail_all(EngineFailure("the engine failed in this request's step", hint="send the request again"))

    def _gave_up(self) -> None:
        self.state = "dead"
        self.fail_all(EngineFailure("the engine is down"))

    def _post(self, call: Callable[[], object]) -> None:
        assert self._loop is not None
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to be told
            self._loop.call_soon_threadsafe(call)

    def _is_hung(self, limit_s: float) -> bool:
        started_at = self._step_started_at
        return started_at is not None and time.monotonic() - started_at > limit_s

    async def _watch(self) -> None:
        """Interrupt a step that hangs, once, and fail what waits for it; the supervisor builds the engine anew."""
        while True:
            await asyncio.sleep(min(1.0, self.limits.hang_s / 4))
            if self.state == "running" and self._is_hung(self.limits.hang_s):
                self.state = "hung"
                self.num_hangs += 1
                log.error("the engine's step has run for more than %g s", self.limits.hang_s)
                self.fail_all(EngineFailure("the engine hangs", hint="it is being restarted; send the request again"))
                if self._thread is not None and self._thread.ident is not None:
                    interrupt(self._thread.ident)


def ended(event: Event) -> bool:
    """Tell whether this is the last event of its sequence."""
    return isinstance(event, Finished | Failed)
