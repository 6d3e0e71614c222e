"""Run a file of hostile programs through the sandbox.

    python -m tests.benchmarks.redteam FILE [--level A+|A|B] [--only NAME ...] [--verbose] [--unlocked]
    python -m tests.benchmarks.redteam --control

FILE is a JSON list of {name, code, expect, also, forbid, note}. `expect` and `also` are outcomes (ok, error, denied,
timeout, memory, output_limit, killed); `forbid` is text that must not be printed, `file:PATH` that must not exist
afterwards, or the name of a side effect. One line per unexpected outcome; the last line is `N programs, M unexpected`;
exit code 1 if M > 0.

After every program, whatever it forbids: a canary step must answer right, beside it and after; the zygote, the victim
(a process of the same user which holds secrets), the canary file and the list of processes must be as before.

`--control` runs attacks of our own with the locks on and again with the locks off: the second time they must escape.
`--unlocked` runs FILE with the locks off, to see which of its programs bite; root only, as it needs a throw-away user.

Steps run as an unprivileged user: this program leaves root if that user can still reach the interpreter, and otherwise
its zygotes leave root by themselves.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import json
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from rstar.config import SandboxSection
from rstar.sandbox import NO_LOCKS, Host, Sandbox, SandboxError, probe
from rstar.sandbox.locks import sandbox_uid
from rstar.types import Execution, ExecutionStatus

SECRET = "CANARY-7f3a"
SECRETS = {"HF_TOKEN": f"{SECRET}-hf", "WANDB_API_KEY": f"{SECRET}-wandb", "SSH_AUTH_SOCK": f"/tmp/{SECRET}.sock"}
FOLDER = Path("/tmp/redteam-canary")
TCP_PORT, UDP_PORT, ABSTRACT = 47017, 47018, "\0redteam-canary"
DATAGRAMS = "/tmp/redteam-datagrams"  # a socket that has a path, as the system log's
LIMITS = SandboxSection(cpu_seconds=2.0, wall_seconds=5.0, processes=1)

CANARY = """
import builtins, logging, math, os, random, sys
import numpy as np
mask = os.umask(0o077)
os.umask(mask)
print(sum(range(10)), math.sqrt(2), len("abc"), os.getcwd() == START, mask, random.random(), np.random.rand())
print(np.geterr(), logging.getLogger().handlers, logging.getLogger().level, len(sys.path), sys.getrecursionlimit())
print(sorted(os.environ), sorted(vars(builtins)), isinstance(1, Exception), hash("a"))
"""


@dataclass(frozen=True)
class Program:
    name: str
    code: str
    expect: str
    also: tuple[str, ...] = ()
    forbid: tuple[str, ...] = ()


# The control run: each gets ESCAPED printed if nothing stopped it. Signal 0 only asks for permission: nobody is hurt.
CONTROL = [
    Program("network", f"import socket\nsocket.create_connection(('127.0.0.1', {TCP_PORT}), 1)", "denied"),
    Program(
        "udp",
        f"import socket\nsocket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', {UDP_PORT}))",
        "denied",
    ),
    Program("abstract socket", f"import socket\nsocket.socket(socket.AF_UNIX).connect({ABSTRACT!r})", "denied"),
    Program("file read", f"assert {SECRET!r} in open('{FOLDER}/secret.txt').read()", "denied"),
    Program("list a folder", f"import os\nos.listdir('{FOLDER}')", "denied"),
    Program("file write", f"open('{FOLDER}/w/file', 'w').write('x')", "denied"),
    Program("file opened for neither", f"import os\nos.open('{FOLDER}/own.txt', 3)", "denied"),
    Program("file mode", f"import os\nos.chmod('{FOLDER}/own.txt', 0o600)", "denied"),
    Program("file remove", f"import os\nos.unlink('{FOLDER}/own.txt')", "denied"),
    Program("signal", "import os\nos.kill(VICTIM, 0)", "denied"),
    Program("signal the zygote", "import os\nos.kill(os.getppid(), 0)", "denied"),
    Program(
        "signal by descriptor owner",
        "import fcntl, os\nr, w = os.pipe()\n"
        "fcntl.fcntl(r, fcntl.F_SETOWN, VICTIM)\nfcntl.fcntl(r, 10, 28)\n"  # F_SETSIG; SIGWINCH hurts nobody
        "fcntl.fcntl(r, fcntl.F_SETFL, os.O_ASYNC | os.O_NONBLOCK)\nos.write(w, b'x')",
        "denied",
    ),
    Program(
        "environment",
        f"assert {SECRET!r} in open('/proc/VICTIM/environ').read()",
        "denied",
        ("error",),  # in a process namespace there is no such file
    ),
    Program("start a process", "import os\npid = os.fork()\nif pid == 0: os._exit(0)\nos.waitpid(pid, 0)", "denied"),
    Program("start a thread", "import threading\nthreading.Thread(target=int).start()", "error"),
    Program(
        "send to a socket's path",
        f"import socket\nsocket.socketpair(type=socket.SOCK_DGRAM)[0].sendto(b'x', '{DATAGRAMS}')",
        "denied",
    ),
    Program("execute a program", "import os\nos.execv('/bin/echo', ['echo', 'ESCAPED'])", "denied"),
    Program("limits of another", "import resource\nresource.prlimit(VICTIM, resource.RLIMIT_NOFILE)", "denied"),
]


def outcomes(execution: Execution) -> set[str]:
    """Every name that fits what happened: a denial that nobody caught is an error too, and so on."""
    status, found = execution.status, {execution.status.value}
    if status is ExecutionStatus.OK and "DENIED" in execution.stdout:
        found.add("denied")
    elif status is ExecutionStatus.DENIED:
        found.add("error")
    elif status is ExecutionStatus.MEMORY:
        found.add("killed" if execution.error.startswith("killed") else "error")
    elif status is ExecutionStatus.OUTPUT_LIMIT:
        found.add("killed")
    elif status is ExecutionStatus.KILLED and execution.error.startswith("left early"):
        found.add("error")
    return found


class Surroundings:
    """What hostile code would like to reach: secrets, files, listeners, a victim. And the proof that it did not."""

    def __init__(self) -> None:
        self.uid = sandbox_uid(os.getpid()) if os.geteuid() == 0 else os.geteuid()
        self._signals: list[int] = []
        for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP, signal.SIGCHLD, signal.SIGINT}:
            with suppress(OSError, ValueError):
                signal.signal(number, lambda received, _: self._signals.append(received))
        self._listeners = []
        Path(DATAGRAMS).unlink(missing_ok=True)
        for family, kind, address in (
            (socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", TCP_PORT)),
            (socket.AF_INET, socket.SOCK_DGRAM, ("127.0.0.1", UDP_PORT)),
            (socket.AF_UNIX, socket.SOCK_STREAM, ABSTRACT),
            (socket.AF_UNIX, socket.SOCK_DGRAM, DATAGRAMS),
        ):
            listener = socket.socket(family, kind)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            if kind == socket.SOCK_STREAM:
                listener.listen()
            listener.setblocking(False)
            self._listeners.append(listener)
        os.chmod(DATAGRAMS, 0o777)
        self.victim = self._start_victim()
        self.lay_out()

    def lay_out(self) -> None:
        """Files that the ordinary permissions give away: nothing but the locks protects them."""
        shutil.rmtree(FOLDER, ignore_errors=True)
        Path("/dev/shm/redteam").unlink(missing_ok=True)
        (FOLDER / "w").mkdir(parents=True)
        for name in ("secret.txt", "own.txt"):
            (FOLDER / name).write_text(f"{SECRET}\n")
            (FOLDER / name).chmod(0o666)
            os.chown(FOLDER / name, self.uid, -1)
        for folder in (FOLDER, FOLDER / "w"):
            folder.chmod(0o777)
            os.chown(folder, self.uid, -1)
        self._before = self._files()

    def _start_victim(self) -> int:
        pid = os.fork()
        if pid == 0:
            for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:
                with suppress(OSError, ValueError):
                    signal.signal(number, signal.SIG_DFL)
            ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
            if os.geteuid() == 0:
                os.setgroups([])
                os.setresgid(self.uid, self.uid, self.uid)
                os.setresuid(self.uid, self.uid, self.uid)
                ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # PR_SET_DUMPABLE: as readable as any process of that user
            while True:
                signal.pause()
        return pid

    def _files(self) -> list[tuple[str, int, int, bytes]]:
        found = []
        for path in sorted([FOLDER, *FOLDER.rglob("*"), *Path("/dev/shm").glob("redteam*")]):
            status = path.lstat()
            content = path.read_bytes() if path.is_file() else b""
            found.append((str(path), status.st_mode, status.st_uid, content))
        return found

    def damage(self) -> list[str]:
        """Side effects since the last look, by the names that the files of programs use."""
        found = []
        if self._files() != self._before:
            found.append("canary-changed")
            self.lay_out()
        if self._signals:
            found.append(f"signals {sorted(self._signals)}")
            self._signals.clear()
        done, _ = os.waitpid(self.victim, os.WNOHANG)
        if done:
            found.append("victim-dead")
            self.victim = self._start_victim()
        for listener in self._listeners:
            with suppress(BlockingIOError):
                if listener.type == socket.SOCK_STREAM:
                    listener.accept()[0].close()
                else:
                    listener.recv(64)
                found.append("reached a listener")
        return found

    def close(self) -> None:
        Path("/dev/shm/redteam").unlink(missing_ok=True)
        Path(DATAGRAMS).unlink(missing_ok=True)
        os.kill(self.victim, signal.SIGKILL)
        os.waitpid(self.victim, 0)
        for listener in self._listeners:
            listener.close()
        shutil.rmtree(FOLDER, ignore_errors=True)


class Arena:
    """A sandbox of one zygote, watched."""

    def __init__(self, sandbox: Sandbox, surroundings: Surroundings) -> None:
        self._sandbox, self._around = sandbox, surroundings
        self._session = sandbox.session(seed=5)
        self._zygotes: list[int] = []
        self._templates: set[int] = set()
        self._folders: list[str] = []
        self._expected = ""

    async def prepare(self) -> None:
        first = (await self._session.run(self._session.root, "import os\nprint(os.getcwd())"))[1]
        self._canary = CANARY.replace("START", repr(first.stdout.strip()))
        self._remember()
        self._expected = (await self._run(self._canary)).stdout

    def _remember(self) -> None:
        self._zygotes = self._sandbox.zygote_pids()
        self._templates = {child.pid for pid in self._zygotes for child in psutil.Process(pid).children()}
        folders = [os.readlink(f"/proc/{pid}/cwd") for pid in self._zygotes]
        self._folders = [folder for folder in folders if folder != "/"]  # with the locks on there is no scratch at all

    async def _run(self, code: str) -> Execution:
        try:
            return (await self._session.run(self._session.root, code))[1]
        except SandboxError as error:  # only without locks can a program do that twice
            return Execution(ExecutionStatus.KILLED, error=f"infrastructure: {error}")

    async def attack(self, program: Program) -> tuple[Execution, list[str]]:
        """Run a program beside and before a canary; returns what it did and everything that is wrong with it."""
        code = program.code.replace("VICTIM", str(self._around.victim))
        started = time.monotonic()
        execution, beside = await asyncio.gather(self._run(code), self._run(self._canary))
        seconds = time.monotonic() - started
        wrong = []
        if not outcomes(execution) & {program.expect, *program.also}:
            wrong.append(f"expected {'/'.join((program.expect, *program.also))}")
        if "\n" in execution.error:
            wrong.append("its error is more than one line")
        shown = execution.stdout + execution.error
        wrong += [f"printed {text!r}" for text in program.forbid if not text.startswith("file:") and text in shown]
        wrong += [
            f"left {text[5:]}" for text in program.forbid if text.startswith("file:") and os.path.exists(text[5:])
        ]
        if "differs-between-two-runs" in program.forbid and (await self._run(code)).stdout != execution.stdout:
            wrong.append("differs-between-two-runs")
        if beside.stdout != self._expected:
            wrong.append(f"other-run-affected: {beside.status.value} {beside.error}")
        after = await self._run(self._canary)
        if after.stdout != self._expected:
            wrong.append(f"next-run-affected: {after.status.value} {after.error}")
        if seconds > 5 * LIMITS.wall_seconds:
            wrong.append(f"hang: {seconds:.1f} s")
        wrong += self._around.damage() + await self._leftovers()
        return execution, wrong

    async def _leftovers(self) -> list[str]:
        found = []
        if self._sandbox.zygote_pids() != self._zygotes or self._sandbox.counts.infrastructure_failures:
            found.append("zygote-dead")
            self._sandbox.counts.infrastructure_failures = 0
            while not self._sandbox.zygote_pids():
                await asyncio.sleep(0.05)
            self._remember()
        alive = set(self._processes()) - set(self._zygotes) - self._templates
        if alive:
            found.append(f"pid-alive: {sorted(alive)}")
            for pid in alive:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        left = [name for folder in self._folders for name in os.listdir(folder)]
        if left:
            found.append(f"scratch-left: {left[:3]}")
        return found

    def _processes(self) -> Iterable[int]:
        """Everything below a zygote, and everything of the sandbox's own user wherever it hangs."""
        for pid in self._zygotes:
            with suppress(psutil.NoSuchProcess):
                yield from (child.pid for child in psutil.Process(pid).children(recursive=True))
        if os.geteuid() == 0:
            for process in psutil.process_iter(["pid", "uids"]):
                same_user = process.info["uids"] and process.info["uids"].real == self._around.uid
                if same_user and process.pid != self._around.victim and process.status() != psutil.STATUS_ZOMBIE:
                    yield process.pid


async def run_all(programs: list[Program], host: Host, *, verbose: bool, unlocked: bool = False) -> int:
    """Run every program; prints a line per unexpected outcome and returns their number."""
    around = Surroundings()
    unexpected = 0
    try:
        async with Sandbox(replace(LIMITS, unsafe_local_exec=unlocked), host=host) as sandbox:
            arena = Arena(sandbox, around)
            await arena.prepare()
            print(f"level {sandbox.level}, steps run as uid {sandbox.uid}", flush=True)
            for program in programs:
                execution, wrong = await arena.attack(program)
                unexpected += bool(wrong)
                if wrong or verbose:
                    seen = f"{execution.status.value}: {execution.error or execution.stdout[:100]!r}"
                    print(ascii(f"{program.name}: {seen}: {'; '.join(wrong) or 'as expected'}")[1:-1], flush=True)
    finally:
        around.close()
    return unexpected


async def control(host: Host) -> int:
    """Own attacks with the locks on, then off. Returns how many behaved wrongly, either way."""
    programs = [replace(one, code=f"{one.code}\nprint('ESCAPED')", forbid=("ESCAPED",)) for one in CONTROL]
    print("locks on: each must be denied")
    wrong = await run_all(programs, host, verbose=True)
    print("locks off: each must escape")
    around = Surroundings()
    try:
        async with Sandbox(replace(LIMITS, unsafe_local_exec=True), host=NO_LOCKS) as sandbox:
            session = sandbox.session()
            for program in programs:
                code = program.code.replace("VICTIM", str(around.victim))
                _, execution = await session.run(session.root, code)
                escaped = "ESCAPED" in execution.stdout
                wrong += not escaped
                seen = "escaped" if escaped else f"did not escape: {execution.status.value} {execution.error}"
                print(f"{program.name}: {seen}")
                around.damage()
    finally:
        around.close()
    return wrong


def load(path: Path) -> list[Program]:
    return [
        Program(item["name"], item["code"], item["expect"], tuple(item.get("also", ())), tuple(item.get("forbid", ())))
        for item in json.loads(path.read_text(encoding="utf-8"))
    ]


def leave_root() -> None:
    """Become the sandbox's user for good, where that user can reach the interpreter, its libraries and this project."""
    if os.geteuid() != 0:
        return
    uid = sandbox_uid(os.getpid())
    needed = [os.path.realpath(sys.executable), os.__file__, psutil.__file__, __file__]
    child = os.fork()
    if child == 0:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
        os._exit(0 if all(os.access(path, os.R_OK) for path in needed) else 1)
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0:
        shutil.rmtree(FOLDER, ignore_errors=True)
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)


def host_of(level: str | None) -> Host:
    """This host, or a lesser one. A level it does not reach is a usage error."""
    host = probe()
    if level == "A":
        host = replace(host, namespaces=())
    elif level == "B":
        host = replace(host, namespaces=(), landlock_abi=min(host.landlock_abi, 1))  # the least that B promises
    return host


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", type=Path, help="a JSON file of programs")
    parser.add_argument("--level", choices=["A+", "A", "B"], help="run at most at this level (default: the best)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="run these programs only")
    parser.add_argument("--verbose", action="store_true", help="a line for every program")
    parser.add_argument("--control", action="store_true", help="own attacks with the locks on and off")
    parser.add_argument("--unlocked", action="store_true", help="FILE with the locks off (root only)")
    arguments = parser.parse_args()
    if arguments.unlocked and os.geteuid() != 0:
        parser.error("--unlocked needs root, to run the programs as a user that owns nothing")
    if not arguments.control and arguments.file is None:
        parser.error("a FILE, or --control")
    if SECRETS.items() - os.environ.items():  # only a process started with them shows them in /proc/PID/environ
        again = [sys.executable, "-m", "tests.benchmarks.redteam", *sys.argv[1:]]
        os.execve(sys.executable, again, {**os.environ, **SECRETS})
    programs = load(arguments.file) if arguments.file else []
    leave_root()
    host = NO_LOCKS if arguments.unlocked else host_of(arguments.level)
    if arguments.control:
        unexpected = asyncio.run(control(host))
        print(f"{2 * len(CONTROL)} programs, {unexpected} unexpected")
        return 1 if unexpected else 0
    if arguments.only:
        programs = [program for program in programs if program.name in arguments.only]
    unexpected = asyncio.run(run_all(programs, host, verbose=arguments.verbose, unlocked=arguments.unlocked))
    print(f"{len(programs)} programs, {unexpected} unexpected")
    return 1 if unexpected else 0


if __name__ == "__main__":
    sys.exit(main())
