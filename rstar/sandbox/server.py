"""The warden: has the template fork, reads two bounded pipes per fork, enforces CPU and wall time, reaps, reports.

It never runs step code and is never forked. What it reads from forks is bytes of bounded length, taken at their word
about the fork itself and about nothing else.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import select
import signal
import time
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import NoReturn

from rstar.sandbox import locks, step
from rstar.sandbox.frames import KERNEL_KILLED, Reply, Request, pack, take
from rstar.sandbox.template import Template

PIPE_CHUNK = 1 << 14
LOOK_AFTER = 0.01  # seconds; most forks are done by then, and their pipes need to be read only once
CHECK_AGAIN = 0.002  # seconds; the finest step of CPU-time enforcement
BUSY_SHARE = 0.01  # a fork that got less CPU than this share of its wall time slept; more: it may be starved
LOOK_UP = 0.25  # seconds; the warden sleeps no longer while forks run, so that it sees when it stood still
STOOD_STILL = 1.0  # seconds that the warden slept past what it asked for
WALL_STRETCH = 4.0  # a busy fork on an overloaded node gets up to this many times its wall time


@dataclass
class Fork:
    """A running evaluation, seen from the warden."""

    request: int
    pid: int
    output: int  # read ends; -1 once at end of file
    report: int
    started: float
    cpu_seconds: float
    wall_seconds: float
    output_bytes: int
    prefix_allowance: float  # CPU seconds for running the steps before again
    next_check: float = 0.0
    wall_end: float = 0.0
    sampled: tuple[float, float] = (0.0, 0.0)  # (time, CPU seconds) when it was last found busy
    clock: int | None = None  # its CPU-time clock, once its pipes are polled too
    reaped: bool = False
    prefix_cpu: float | None = None
    printed: bytearray = field(default_factory=bytearray)
    said: bytearray = field(default_factory=bytearray)
    verdict: str = ""  # status decided here: timeout, output_limit, cancelled
    reason: str = ""


class Server:
    """Serves the supervisor at the other end of `control` until it goes away. `locked`: forks cannot fork on."""

    def __init__(self, control: int, template: Template, entries: Collection[str], *, locked: bool) -> None:
        self._control, self._template, self._entries, self._locked = control, template, entries, locked
        self._incoming, self._outgoing = bytearray(), bytearray()
        self._forks: dict[int, Fork] = {}  # by pid
        self._pipes: dict[int, Fork] = {}  # by read end
        self._wake, wake_write = os.pipe()
        for end in (control, self._wake, wake_write):
            os.set_blocking(end, False)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        self._poll = select.poll()
        self._poll.register(control, select.POLLIN)
        self._poll.register(self._wake, select.POLLIN)

    def serve(self) -> NoReturn:
        while True:
            for descriptor, events in self._waited(self._patience()):
                if descriptor == self._control:
                    self._send()
                    if events & ~select.POLLOUT:
                        self._receive()
                elif descriptor == self._wake:
                    with contextlib.suppress(BlockingIOError):
                        os.read(self._wake, 4096)
                    self._reap()
                elif descriptor in self._pipes:
                    self._read(descriptor, self._pipes[descriptor])
            self._enforce()

    def _waited(self, patience: float | None) -> list[tuple[int, int]]:
        """What poll found. While a machine stands still (a frozen cgroup, a laptop's lid) no fork's time runs."""
        asked = time.monotonic()
        found = self._poll.poll(patience)
        stood = time.monotonic() - asked - (patience or 0.0) / 1e3
        if patience is not None and stood > STOOD_STILL:
            for fork in self._forks.values():
                fork.started, fork.wall_end = fork.started + stood, fork.wall_end + stood
                fork.sampled = (fork.sampled[0] + stood, fork.sampled[1])
        return found

    def _patience(self) -> float | None:
        if not self._forks:
            return None
        earliest = min(fork.next_check for fork in self._forks.values())
        return math.ceil(min(LOOK_UP, max(0.0, earliest - time.monotonic())) * 1000)

    # Requests

    def _receive(self) -> None:
        data = os.read(self._control, 1 << 16)
        if not data:
            os._exit(0)  # the supervisor is gone; PR_SET_PDEATHSIG takes the forks along
        self._incoming += data
        while (message := take(self._incoming, Request)) is not None:
            request = message[0]
            if request.kind in ("run", "call"):
                self._fork(request)
            elif request.kind == "cancel":
                for fork in self._forks.values():
                    if fork.request == request.id and not fork.verdict:
                        self._kill(fork, "cancelled", "")
            elif request.kind == "forks":
                self._answer(Reply(request.id, seconds=self._template.bare_forks(request.seed)))
            else:
                self._answer(Reply(request.id))

    def _answer(self, reply: Reply, body: bytes = b"") -> None:
        self._outgoing += pack(reply, body)
        self._send()

    def _send(self) -> None:
        try:
            while self._outgoing:
                del self._outgoing[: os.write(self._control, self._outgoing)]
        except BlockingIOError:
            pass
        except (BrokenPipeError, ConnectionResetError):
            os._exit(0)
        self._poll.modify(self._control, select.POLLIN | (select.POLLOUT if self._outgoing else 0))

    # Forks

    def _fork(self, request: Request) -> None:
        entry, codes = None, request.codes
        if request.kind == "call":
            entry, codes = codes[0], codes[1:]
            if entry not in self._entries:
                self._answer(Reply(request.id, "error", f"no entry {entry!r} in this zygote"))
                return
        allowance = request.cpu_seconds * (len(codes) - 1)
        cpu_limit = math.ceil(allowance + request.cpu_seconds) + 1
        output_read, output_write = os.pipe()
        report_read, report_write = os.pipe()
        pid = self._template.fork(step.pack(entry, codes), request.seed, cpu_limit, report_write, output_write)
        os.close(output_write)
        os.close(report_write)
        now = time.monotonic()
        self._forks[pid] = Fork(
            request.id, pid, output_read, report_read, now,
            request.cpu_seconds, request.wall_seconds, request.output_bytes, allowance,
            next_check=now + LOOK_AFTER, wall_end=now + request.wall_seconds * len(codes), sampled=(now, 0.0),
        )  # fmt: skip

    def _read(self, descriptor: int, fork: Fork) -> bool:
        """Take what a pipe holds; False when that was all."""
        try:
            data = os.read(descriptor, PIPE_CHUNK)
        except BlockingIOError:
            return False
        if descriptor == fork.report:
            room = step.REPORT_HEAD.size + step.REPORT_BYTES - len(fork.said)  # the end of the prefix, the end
            if len(data) > room and not fork.verdict:
                self._kill(fork, "output_limit", "wrote more than a report into the pipe for reports")
            fork.said += data[:room]
            if fork.prefix_cpu is None and len(fork.said) >= step.REPORT_HEAD.size:
                kind, cpu = step.REPORT_HEAD.unpack_from(fork.said)
                if kind == step.PREFIX_DONE:
                    del fork.said[: step.REPORT_HEAD.size]
                    fork.prefix_cpu = cpu if 0 <= cpu <= fork.prefix_allowance + 1.0 else 0.0
                    now = time.monotonic()  # the step's own limits count from here
                    fork.started, fork.wall_end, fork.next_check = now, now + fork.wall_seconds, now
                    fork.sampled = (now, fork.prefix_cpu)
        else:
            fork.printed += data[: fork.output_bytes - len(fork.printed) + 1]
            if len(fork.printed) > fork.output_bytes and not fork.verdict:
                self._kill(fork, "output_limit", f"printed more than {fork.output_bytes} bytes")
        if not data:
            self._forget(descriptor, fork)
        return len(data) == PIPE_CHUNK

    def _watch(self, fork: Fork) -> int:
        """Look after a fork that did not end at once: read its pipes as they fill, follow its CPU time."""
        fork.clock = _cpu_clock(fork.pid)
        for end in (fork.output, fork.report):
            os.set_blocking(end, False)
            self._pipes[end] = fork
            self._poll.register(end, select.POLLIN)
        return fork.clock

    def _forget(self, descriptor: int, fork: Fork) -> None:
        if fork.clock is not None:
            self._poll.unregister(descriptor)
            del self._pipes[descriptor]
        os.close(descriptor)
        if descriptor == fork.report:
            fork.report = -1
        else:
            fork.output = -1

    # Limits

    def _kill(self, fork: Fork, verdict: str, reason: str) -> None:
        fork.verdict, fork.reason = verdict, reason
        if fork.reaped:
            return  # its pid may be somebody else's by now
        os.kill(fork.pid, signal.SIGKILL)
        if not self._locked:
            with contextlib.suppress(OSError):
                os.killpg(fork.pid, signal.SIGKILL)

    def _enforce(self) -> None:
        now = time.monotonic()
        for fork in self._forks.values():
            if fork.next_check > now or fork.verdict:
                if fork.verdict:
                    fork.next_check = now + 1.0
                continue
            used = _cpu_time(fork.clock if fork.clock is not None else self._watch(fork))
            before = fork.prefix_cpu
            limit = fork.cpu_seconds + (fork.prefix_allowance if before is None else before)
            if used >= limit:
                self._kill(fork, "timeout", f"used {fork.cpu_seconds:g} s of CPU time")
                continue
            if now >= fork.wall_end:
                since, cpu_then = fork.sampled
                busy = used - cpu_then >= BUSY_SHARE * (now - since)
                if not busy or now - fork.started >= WALL_STRETCH * fork.wall_seconds:
                    self._kill(fork, "timeout", f"ran for {now - fork.started:.1f} s of wall time")
                    continue
                fork.sampled, fork.wall_end = (now, used), now + fork.wall_seconds / 2
            fork.next_check = min(fork.wall_end, now + max(CHECK_AGAIN, limit - used))

    # Ends

    def _reap(self) -> None:
        while (ended := os.wait4(-1, os.WNOHANG))[0]:  # the template is always there
            pid, status, usage = ended
            if pid == self._template.pid:
                raise RuntimeError(f"the template ended with wait status {status}")
            fork = self._forks.pop(pid)
            fork.reaped = True
            for end in (fork.output, fork.report):
                if end >= 0:
                    if not self._locked:  # without locks it may have left a child that holds the write end
                        os.set_blocking(end, False)
                    while self._read(end, fork):
                        pass
            for end in (fork.output, fork.report):
                if end >= 0:
                    self._forget(end, fork)
            self._answer(
                _reply(fork, status, usage.ru_utime + usage.ru_stime), bytes(fork.printed[: fork.output_bytes])
            )


def _reply(fork: Fork, status: int, cpu: float) -> Reply:
    prefix = fork.prefix_cpu or 0.0
    kind, claimed, text = b"", cpu, ""
    if len(fork.said) >= step.REPORT_HEAD.size:
        kind, claimed = step.REPORT_HEAD.unpack_from(fork.said)
        text = fork.said[step.REPORT_HEAD.size :].decode("utf-8", "replace")
    known = {
        step.OK: "ok", step.ERROR: "error", step.DENIED: "denied", step.MEMORY: "memory", step.PREFIX_FAILED: "error"
    }  # fmt: skip
    code = os.waitstatus_to_exitcode(status)
    if fork.verdict:
        verdict, text, claimed = fork.verdict, fork.reason, cpu
    elif code < 0:
        name = signal.Signals(-code).name if -code in {*signal.Signals} else f"signal {-code}"
        verdict, text, claimed = "killed", f"killed by {name}", cpu
        if -code == signal.SIGKILL:  # no step can send it and the warden did not: the kernel was out of memory
            verdict, text = KERNEL_KILLED, "killed by the kernel, out of memory"
            if cpu >= fork.cpu_seconds + fork.prefix_allowance:  # or past RLIMIT_CPU, and the warden came too late
                verdict, text = "timeout", f"used {fork.cpu_seconds:g} s of CPU time"
        elif -code == signal.SIGXCPU:
            verdict, text = "timeout", f"used {fork.cpu_seconds:g} s of CPU time"
    elif code != 0 or kind not in known:
        verdict, text = "killed", f"left early, exit code {code}"
    else:
        verdict = known[kind]
    spent = claimed if math.isfinite(claimed) and prefix <= claimed <= cpu + 0.1 else cpu
    return Reply(
        fork.request,
        verdict,
        _one_line(text[: step.MAX_ERROR])[: step.MAX_ERROR] if verdict != "ok" else "",
        cpu_ms=max(0.0, spent - prefix) * 1e3,
        prefix_cpu_ms=prefix * 1e3,
    )


def _one_line(text: str) -> str:
    """Text of a fork, fit for a log: line breaks become spaces, what a terminal would act on becomes an escape."""
    if text.isprintable():
        return text
    return "".join(
        one if one.isprintable() else " " if one == "\n" else one.encode("unicode_escape").decode() for one in text
    )


def _cpu_clock(pid: int) -> int:
    """The clock of another process's CPU time. Under RLIMIT_CPU it moves in scheduler ticks, 1 to 10 ms."""
    clock = ctypes.c_int()
    code = locks.libc.clock_getcpuclockid(ctypes.c_int(pid), ctypes.byref(clock))
    if code != 0:
        raise OSError(code, "clock_getcpuclockid")
    return clock.value


def _cpu_time(clock: int) -> float:
    try:
        return time.clock_gettime(clock)
    except OSError:  # EINVAL: it has just died and is about to be reaped
        return 0.0
