"""The sandbox as the rest of the project sees it: sessions with value semantics over a pool of locked zygotes."""

from __future__ import annotations

import asyncio
import logging
import os
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import TYPE_CHECKING

from rstar.sandbox import levels, locks, preload
from rstar.sandbox.checks import Check, attack, require_locks
from rstar.sandbox.entries import ENTRIES
from rstar.sandbox.frames import KERNEL_KILLED, Ready, Reply, Request, Setup
from rstar.sandbox.process import ZygoteLost, ZygoteProcess
from rstar.types import Execution, ExecutionStatus, UserError

if TYPE_CHECKING:  # a zygote imports this package too, and should stay small
    from rstar.config import SandboxSection

log = logging.getLogger(__name__)

MAX_SOURCE = 128 << 10  # bytes of one step's code
MAX_PROGRAM = 1 << 20  # bytes of all the codes of a path
MAX_PAYLOAD = 1 << 20  # bytes of text for `call`
FRESH = 2  # evaluations a zygote starts at once: one runs while the next is forked
OLD_AFTER = 0.25  # seconds after which an evaluation no longer holds up others
TOTAL = 8  # evaluations of a zygote alive at once; bounds the memory that hostile steps can hold
EXPENSIVE_MS = 10.0
REBUILDS = 3  # failed attempts at a new zygote before the pool gives up


class SandboxError(RuntimeError):
    """The sandbox itself failed, twice. Says nothing about the step: never make it a failed step."""


@dataclass
class Counts:
    """What went wrong with the infrastructure, and how much work was done."""

    evaluations: int = 0
    infrastructure_failures: int = 0  # zygotes that died or stopped answering
    retries: int = 0  # evaluations started again because of that
    step_cpu_seconds: float = 0.0  # spent in new steps
    prefix_cpu_seconds: float = 0.0  # spent in running the steps before again
    dear_prefixes: int = 0  # evaluations whose prefix took more than 10 ms of CPU: what keeping states alive would save


@dataclass(frozen=True)
class State:
    """The codes run so far on a path. A value: any number of runs may start from it, and none changes it."""

    codes: tuple[str, ...] = ()


class Session:
    """One problem's view of the sandbox: every evaluation starts with the same random seeds."""

    def __init__(self, sandbox: Sandbox, seed: int) -> None:
        self.root = State()
        self._sandbox, self._seed = sandbox, seed

    def state(self, codes: Sequence[str]) -> State:
        """The state after `codes`, which are known to run (a tree loaded from disk)."""
        return State(tuple(codes))

    async def run(self, parent: State, code: str) -> tuple[State, Execution]:
        """Run `code` as the continuation of `parent`'s program.

        Returns the new state and what this code alone did: `stdout` exactly what it printed, `cpu_ms` its own CPU time.
        A failed run returns `parent`. Raises SandboxError when the infrastructure fails twice.
        """
        execution = await self._sandbox._run(parent.codes, code, self._seed)
        if execution.status is ExecutionStatus.OK:
            return State((*parent.codes, code)), execution
        return parent, execution


class Pool:
    """Zygotes of one kind. Hands out places on them, evenly; replaces one that is lost."""

    def __init__(self, setup: Setup, size: int, prefix: Sequence[str], counts: Counts) -> None:
        self._setup, self._prefix, self._counts = setup, prefix, counts
        self.zygotes: list[ZygoteProcess] = []
        self._size = size
        self._waiting: deque[asyncio.Future[ZygoteProcess]] = deque()
        self._rebuilding: set[asyncio.Task[None]] = set()
        self._failure: Exception | None = None
        self._closed = False

    async def start(self) -> list[Ready]:
        self.zygotes = [ZygoteProcess(self._setup, self._prefix) for _ in range(self._size)]
        results = await asyncio.gather(*(zygote.start() for zygote in self.zygotes), return_exceptions=True)
        failures = [result for result in results if isinstance(result, BaseException)]
        if failures:
            await self.close()
            if isinstance(failures[0], ZygoteLost | OSError):
                raise SandboxError(f"the sandbox did not start: {failures[0]}") from failures[0]
            raise failures[0]
        return [zygote.ready for zygote in self.zygotes]

    async def close(self) -> None:
        self._closed = True
        for task in list(self._rebuilding):
            task.cancel()
        await asyncio.gather(*self._rebuilding, return_exceptions=True)
        for waiter in self._waiting:
            if not waiter.done():
                waiter.set_exception(SandboxError("the sandbox was closed"))
        await asyncio.gather(*(zygote.close() for zygote in self.zygotes))
        self.zygotes = []

    async def evaluate(self, request: Request, patience: float) -> tuple[Reply, bytes]:
        """Run one request on the zygote with the most room. Raises ZygoteLost when that zygote failed under it."""
        for idle in [one for one in self.zygotes if not one.alive and not one.total]:
            self._counts.infrastructure_failures += 1
            log.warning("sandbox: zygote %d died while it had nothing to do; started again", idle.pid)
            self._replace(idle)
        zygote = await self._place()
        aged = False

        def age() -> None:
            nonlocal aged
            if not aged:
                aged = True
                zygote.fresh -= 1
                self._hand_out()

        timer = asyncio.get_running_loop().call_later(OLD_AFTER, age)
        try:
            return await zygote.ask(request, patience)
        except ZygoteLost:
            self._replace(zygote)
            raise
        finally:
            timer.cancel()
            zygote.total -= 1
            age()
            self._hand_out()

    def _reserve(self) -> ZygoteProcess | None:
        free = [zygote for zygote in self.zygotes if zygote.alive and zygote.fresh < FRESH and zygote.total < TOTAL]
        zygote = min(free, key=lambda zygote: (zygote.fresh, zygote.total), default=None)
        if zygote is not None:
            zygote.fresh += 1
            zygote.total += 1
        return zygote

    async def _place(self) -> ZygoteProcess:
        if self._closed:
            raise SandboxError("the sandbox was closed")
        if self._failure is not None:
            raise SandboxError(f"no zygote could be started: {self._failure}") from self._failure
        zygote = self._reserve() if not self._waiting else None
        if zygote is not None:
            return zygote
        waiter: asyncio.Future[ZygoteProcess] = asyncio.get_running_loop().create_future()
        self._waiting.append(waiter)
        try:
            return await waiter
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled() and waiter.exception() is None:
                waiter.result().fresh -= 1
                waiter.result().total -= 1
                self._hand_out()
            raise

    def _hand_out(self) -> None:
        while self._waiting:
            if self._waiting[0].done():
                self._waiting.popleft()
                continue
            zygote = self._reserve()
            if zygote is None:
                return
            self._waiting.popleft().set_result(zygote)

    def _replace(self, lost: ZygoteProcess) -> None:
        if lost in self.zygotes and not self._closed:
            self.zygotes.remove(lost)
            task = asyncio.get_running_loop().create_task(self._rebuild(lost))
            self._rebuilding.add(task)
            task.add_done_callback(self._rebuilding.discard)

    async def _rebuild(self, lost: ZygoteProcess) -> None:
        await lost.close()
        for attempt in range(REBUILDS):
            zygote = ZygoteProcess(self._setup, self._prefix)
            try:
                await zygote.start()
            except (ZygoteLost, UserError, OSError) as error:
                await zygote.close()
                log.warning("sandbox: a zygote could not be rebuilt (attempt %d): %s", attempt + 1, error)
                failure: Exception = error
            else:
                self.zygotes.append(zygote)
                self._failure = None
                self._hand_out()
                return
        if not self.zygotes:
            self._failure = failure
            while self._waiting:
                waiter = self._waiting.popleft()
                if not waiter.done():
                    waiter.set_exception(SandboxError(f"no zygote could be started: {failure}"))


class Sandbox:
    """Runs untrusted code. Owns its zygotes; bound to the event loop it was started in.

    Args:
        section: bounds on one step, number of zygotes.
        host: what the machine offers; None looks. A lesser Host shows what a lesser machine would do.
        patience: seconds a zygote may be silent before it counts as wedged.
    """

    def __init__(self, section: SandboxSection, *, host: levels.Host | None = None, patience: float = 10.0) -> None:
        self._section, self._patience = section, patience
        self.host = host or levels.probe()
        self.level = levels.level_of(self.host, allow_unsafe=section.unsafe_local_exec)
        self.counts = Counts()
        self._steps: Pool | None = None
        self._grading: Pool | None = None
        self._grading_started = asyncio.Lock()
        self._ids = 0

    async def __aenter__(self) -> Sandbox:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    @property
    def processes(self) -> int:
        return self._section.processes or min(4, len(os.sched_getaffinity(0)))

    @property
    def uid(self) -> int:
        """The user that steps run as."""
        return self._zygotes[0].ready.uid if self._zygotes else -1

    def zygote_pids(self) -> list[int]:
        """Processes that are serving steps at this moment."""
        return [zygote.pid for zygote in self._zygotes if zygote.alive]

    def describe_zygote(self) -> str:
        """One line for `rstar doctor`."""
        ready = self._zygotes[0].ready
        return (
            f"imports {ready.import_ms / 1e3:.2f} s, locks {ready.lock_ms:.0f} ms, {ready.resident_mib:.0f} MiB "
            f"({ready.huge_mib:.0f} in huge pages), uid {ready.uid}"
        )

    @property
    def _zygotes(self) -> list[ZygoteProcess]:
        return self._steps.zygotes if self._steps is not None else []

    async def start(self, *, check: bool = True) -> None:
        """Start the zygotes and attack them (`check=False` leaves that to the caller).

        Raises UserError when a lock does not hold: nothing runs then.
        """
        if self.level in ("B", "unsafe"):
            log.warning("sandbox: %s", levels.PROMISES[self.level])
        setup = self._setup(preload.STEP_MODULES, preload.WARM_UP, {})
        self._steps = Pool(setup, self.processes, self._prefix, self.counts)
        try:
            await self._steps.start()
            if check:
                await require_locks(self)
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """End every process. What is in flight fails."""
        for pool in (self._steps, self._grading):
            if pool is not None:
                await pool.close()
        self._steps = self._grading = None

    def session(self, seed: int = 0) -> Session:
        """A session for one problem: `random` and `numpy.random` start from `seed` in each of its evaluations."""
        return Session(self, seed)

    async def call(self, function: str, payload: str, *, cpu_seconds: float, wall_seconds: float) -> Execution:
        """Run a trusted function of `entries.ENTRIES` on untrusted text, behind the same locks.

        Returns its text as `stdout`. Raises SandboxError when the infrastructure fails twice.
        """
        if function not in ENTRIES:
            raise KeyError(f"no sandbox entry {function!r}; there are {sorted(ENTRIES)}")
        if len(payload) > MAX_PAYLOAD:
            what = f"payload too large: {len(payload)} characters, at most {MAX_PAYLOAD}"
            return Execution(ExecutionStatus.ERROR, error=what)
        async with self._grading_started:
            if self._grading is None:
                setup = self._setup(preload.GRADING_MODULES, "", ENTRIES)
                pool = Pool(setup, min(2, self.processes), self._prefix, self.counts)
                await pool.start()
                self._grading = pool
        codes = [function, payload]
        return await self._execute(self._grading, "call", codes, 0, cpu_seconds, wall_seconds, MAX_PAYLOAD)

    async def run_limited(self, code: str, cpu_seconds: float) -> Execution:
        """Run one program by itself with a CPU limit of its own (self-checks)."""
        assert self._steps is not None
        return await self._execute(self._steps, "run", [code], 0, cpu_seconds, 5 * cpu_seconds, 1 << 16)

    async def bare_forks(self, count: int) -> float:
        """Locked forks per second that start and leave, on all zygotes at once: the floor under every evaluation."""
        replies = await asyncio.gather(
            *(zygote.ask(Request(-(1 << 40), "forks", seed=count, wall_seconds=60), 600) for zygote in self._zygotes)
        )
        return sum(count / reply.seconds for reply, _ in replies)

    async def _run(self, prefix: tuple[str, ...], code: str, seed: int) -> Execution:
        section = self._section
        size, program = _bytes(code), sum(map(_bytes, prefix))
        if size > MAX_SOURCE or size + program > MAX_PROGRAM:
            what = f"{size} bytes, at most {MAX_SOURCE}; {size + program} with its prefix, at most {MAX_PROGRAM}"
            return Execution(ExecutionStatus.ERROR, error=f"source too large: {what}")
        if self._steps is None:
            raise SandboxError("the sandbox is not started")
        limits = section.cpu_seconds, section.wall_seconds, section.output_kib << 10
        return await self._execute(self._steps, "run", [*prefix, code], seed, *limits)

    async def _execute(
        self, pool: Pool, kind: str, codes: list[str], seed: int, cpu_seconds: float, wall_seconds: float, output: int
    ) -> Execution:
        self._ids += 1
        request = Request(self._ids, kind, codes, seed, cpu_seconds, wall_seconds, output)
        self.counts.evaluations += 1
        try:
            reply, printed = await pool.evaluate(request, self._patience)
            if reply.status == KERNEL_KILLED:
                raise ZygoteLost(reply.error)  # it alone was lost: its own limit on memory would have been an error
        except ZygoteLost as first:
            self.counts.infrastructure_failures += 1
            self.counts.retries += 1
            log.warning("sandbox: %s; started again", first)
            try:
                reply, printed = await pool.evaluate(request, self._patience)
            except ZygoteLost as second:
                self.counts.infrastructure_failures += 1
                raise SandboxError(f"the sandbox failed twice under one evaluation: {first}; {second}") from second
            if reply.status == KERNEL_KILLED:  # so it is the step that this machine has no room for
                self.counts.infrastructure_failures += 1
                reply = replace(reply, status=ExecutionStatus.MEMORY.value)
        self.counts.step_cpu_seconds += reply.cpu_ms / 1e3
        self.counts.prefix_cpu_seconds += reply.prefix_cpu_ms / 1e3
        self.counts.dear_prefixes += reply.prefix_cpu_ms > EXPENSIVE_MS
        return reply.execution(printed)

    def _setup(self, modules: list[str], warm_up: str, entries: dict[str, str]) -> Setup:
        unsafe = self.level == "unsafe"
        return Setup(
            modules=modules,
            warm_up=warm_up,
            entries=entries,
            memory_bytes=self._section.memory_mib << 20,
            uid=locks.sandbox_uid(os.getpid()),
            landlock_abi=0 if unsafe else self.host.landlock_abi,
            seccomp=not unsafe,
        )

    @property
    def _prefix(self) -> tuple[str, ...]:
        return self.host.namespaces if self.level == "A+" else ()


def _bytes(code: str) -> int:
    return len(code.encode("utf-8", "surrogatepass"))


def checks(section: SandboxSection) -> list[Check]:
    """What `rstar doctor` prints: the host, the level, then each self-check. Uses a sandbox of one zygote."""
    host = levels.probe()
    found = [
        Check("Landlock", host.landlock_abi > 0, f"ABI {host.landlock_abi}" if host.landlock_abi else host.problem),
        Check("seccomp", host.seccomp, "filters named by libseccomp" if host.seccomp else host.problem),
        Check("namespaces", True, host.namespaces[0] if host.namespaces else "no working bubblewrap: A at best"),
    ]
    try:
        sandbox = Sandbox(replace(section, processes=1))
    except UserError as error:
        return [*found, Check("level", False, str(error))]
    found.append(Check("level", sandbox.level != "unsafe", f"{sandbox.level}: {levels.PROMISES[sandbox.level]}"))

    async def attacks() -> list[Check]:
        try:
            await sandbox.start(check=False)
            return [Check("zygote", True, sandbox.describe_zygote()), *await attack(sandbox)]
        except (UserError, RuntimeError) as error:
            return [Check("start", False, str(error))]
        finally:
            await sandbox.close()

    return found + asyncio.run(attacks())
