"""The process that is forked: locked, with the libraries loaded, and kept as it was at the start.

Every memory page that it writes to between two forks has to be copied at the next fork, and a huge page is split. So it
does next to nothing: another process, the warden (`server`), keeps the state and is the parent of its forks.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import resource
import socket
import struct
import time
from collections.abc import Sequence
from typing import NoReturn

from rstar.sandbox import locks, step

ORDER = struct.Struct("=IqII")  # bytes of the program that follows, seed, CPU limit in seconds, number of bare forks
PID, SECONDS = struct.Struct("=i"), struct.Struct("=d")  # the answers: to a program, to bare forks
LINK = 39  # descriptor of the way to the warden
FIRST_LIBRARY_FD = 40
TWO_DESCRIPTORS = socket.CMSG_SPACE(2 * PID.size)
REHEARSALS = 20  # Python's interpreter adapts to code that it has run eight times
REHEARSAL = """
a = 1 / 2
b = [a, 3]
for i in range(2):
    print(f"{a} is", i)
def f(x):
    return x + len(b)
print(f(a) * 2)
"""


class Template:
    """The warden's end. EOFError or OSError from either method: the template is gone."""

    def __init__(self, link: socket.socket, pid: int) -> None:
        self._link, self.pid = link, pid

    def fork(self, program: bytes, seed: int, cpu_limit: int, report: int, output: int) -> int:
        """Have a fork run `program` (see `step.run`) on the write ends of two pipes; returns its pid."""
        self._send(ORDER.pack(len(program), seed, cpu_limit, 0) + program, [report, output])
        pid: int = PID.unpack(self._receive(PID.size))[0]
        return pid

    def bare_forks(self, count: int) -> float:
        """Seconds for `count` locked forks that leave at once: the floor under every evaluation."""
        self._send(ORDER.pack(0, 0, 0, count), [])
        seconds: float = SECONDS.unpack(self._receive(SECONDS.size))[0]
        return seconds

    def _send(self, message: bytes, descriptors: list[int]) -> None:
        sent = socket.send_fds(self._link, [message], descriptors)
        if sent < len(message):
            self._link.sendall(memoryview(message)[sent:])

    def _receive(self, size: int) -> bytes:
        data = self._link.recv(size, socket.MSG_WAITALL)
        if len(data) < size:
            raise EOFError("the template is gone")
        return data


def start(filter_: locks.Filter | None, entries: step.Entries) -> Template:
    """Fork the template off this process, which becomes its warden. The template itself never returns from here.

    `rehearse` has been called; all that the template does from its first instruction on is to serve.
    """
    ours, theirs = socket.socketpair()
    pid = locks.forker(sibling=False)()
    if pid == 0:
        locks.die_with_parent()
        os.dup2(theirs.fileno(), LINK)
        link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, LINK)
        ours.detach()
        theirs.detach()
        os.closerange(step.REPORT, LINK)
        serve(link, filter_, entries)
    theirs.close()
    return Template(ours, pid)


def serve(link: socket.socket, filter_: locks.Filter | None, entries: step.Entries) -> NoReturn:
    """Fork on request until the warden goes away. Each fork takes its last lock and runs its program."""
    warden, seed, fork = os.getppid(), None, locks.forker(sibling=True)
    order = bytearray(ORDER.size)
    while True:
        # The descriptors land on the lowest free numbers: REPORT, OUTPUT.
        if link.recvmsg_into([order], TWO_DESCRIPTORS)[0] < ORDER.size:
            os._exit(0)
        size, new_seed, cpu_limit, bare = ORDER.unpack_from(order)
        if bare:
            link.sendall(SECONDS.pack(_bare_forks(bare, filter_)))
            continue
        program = bytearray(size)
        if link.recv_into(program, size, socket.MSG_WAITALL) < size:
            os._exit(0)
        if new_seed != seed:
            seed = new_seed
            step.seed_libraries(seed)
        pid = fork()
        if pid == 0:
            enter(warden, cpu_limit, filter_)
            step.run(program, entries)
        program[:] = bytes(size)  # freed memory is inherited too: the next fork would find this problem's program there
        os.closerange(step.REPORT, step.OUTPUT + 1)
        link.sendall(PID.pack(pid))


def _bare_forks(count: int, filter_: locks.Filter | None) -> float:
    parent, fork = os.getpid(), locks.forker(sibling=False)
    started = time.perf_counter()
    for _ in range(count):
        pid = fork()
        if pid == 0:
            enter(parent, 2, filter_)
            os._exit(0)
        os.waitpid(pid, 0)
    return time.perf_counter() - started


def enter(parent: int, cpu_limit: int, filter_: locks.Filter | None) -> None:
    """In a new fork: die with its parent, keep no descriptor but its pipes and a null device, take the last lock.

    The null device is opened anew: flags set on a description that is shared would be seen by all later forks.
    """
    locks.die_with_parent()
    if os.getppid() != parent:
        os._exit(70)
    os.dup2(os.open(os.devnull, os.O_RDWR), 0)
    os.dup2(0, 2)
    os.closerange(step.OUTPUT + 1, FIRST_LIBRARY_FD)
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_limit, cpu_limit))  # behind the warden's finer one
    if filter_ is not None:
        filter_.load()
    else:
        os.setpgid(0, 0)


class _Rehearsed(BaseException):
    """Where a fork would leave."""


def rehearse(entries: step.Entries, keep: Sequence[int]) -> None:
    """Do what forks do, without effect: what Python adapts, resolves and caches by it is then inherited.

    The prints go to the null device and the locks are not taken: a filter without instructions is refused. Of the
    descriptors below FIRST_LIBRARY_FD only the standard ones and `keep` are left.
    """

    def leave(code: int) -> NoReturn:
        raise _Rehearsed

    kept = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, FIRST_LIBRARY_FD) for descriptor in (2, *keep)]
    unlimited = resource.getrlimit(resource.RLIMIT_CPU)[1]
    program, no_filter = step.pack(None, [REHEARSAL]), locks.Filter(b"")
    for _ in range(REHEARSALS):
        step.prepare()
        with contextlib.suppress(OSError):
            enter(os.getppid(), unlimited, no_filter)
        os.dup2(0, step.REPORT)
        os.dup2(0, step.OUTPUT)
        with contextlib.suppress(_Rehearsed):
            step.run(program, entries, leave)
    step.prepare()
    locks.prctl(locks.PR_SET_PDEATHSIG, 0)  # its parent is a thread of the supervisor, which may end before the others
    os.close(step.REPORT)
    for descriptor, copy in zip((2, *keep), kept, strict=True):
        os.dup2(copy, descriptor)
        os.close(copy)
