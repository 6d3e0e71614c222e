"""One zygote process, seen from the supervisor: started clean, asked over a socket, watched, killed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rstar.sandbox.frames import Ready, Reply, Request, Setup, pack, take
from rstar.types import UserError

START_SECONDS = 120.0  # bound on imports from a cold, slow disk
GRACE_SECONDS = 60.0  # past an evaluation's own limits: a bound that only a bug or a frozen process reaches
ENVIRONMENT = {
    "PYTHONHASHSEED": "0",
    "PYTHONIOENCODING": "utf-8:backslashreplace",  # what a step prints is never refused
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "LANG": "C.UTF-8",
    "TZ": "UTC",
    "MPLBACKEND": "Agg",
    "HOME": "/nonexistent",
}
MAIN = "from rstar.sandbox.zygote import main; main()"


class ZygoteLost(Exception):
    """The zygote died, stopped answering, or sent garbage. Not the fault of the step it was running."""


class _Link(asyncio.Protocol):
    """The supervisor's end of the socket: hands out whole messages, notes when anything was heard."""

    def __init__(self, on_data: Callable[[bytes], None], on_end: Callable[[str], None]) -> None:
        self._on_data, self._on_end = on_data, on_end

    def data_received(self, data: bytes) -> None:
        self._on_data(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self._on_end(f"its socket closed ({exc})" if exc else "it exited")


class ZygoteProcess:
    """A zygote and the requests it is working on."""

    def __init__(self, setup: Setup, prefix: Sequence[str]) -> None:
        self._setup, self._prefix = setup, prefix
        self.alive = False
        self.fresh = self.total = 0  # evaluations on it, of those the recent ones; kept by the pool
        self.ready = Ready()
        self._buffer = bytearray()
        self._pending: dict[int, asyncio.Future[tuple[Reply, bytes]]] = {}
        self._bounds: dict[int, float] = {}  # when each of them must have been answered
        self._heard = 0.0
        self._pings = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._transport: asyncio.Transport | None = None
        self._started: asyncio.Future[Ready] | None = None
        self._watch: asyncio.Task[None] | None = None
        self._folder = ""
        self._stderr = -1
        self.pid = 0  # of the zygote itself, in this process's view

    async def start(self) -> None:
        """Start the process and wait until its locks are on. Raises UserError with its reason when it gives up."""
        loop = asyncio.get_running_loop()
        ours, theirs = socket.socketpair()
        info_read, info_write = os.pipe()
        self._stderr, stderr_write = os.pipe()
        os.set_blocking(self._stderr, False)
        if not self._setup.seccomp:  # without locks a step could empty its working folder: give it one of its own
            self._folder = tempfile.mkdtemp(prefix="rstar-sandbox-")
            os.chmod(self._folder, 0o755)
        command = [sys.executable, "-s", "-B", "-P", "-c", MAIN, str(theirs.fileno())]
        if self._prefix:
            command = [*self._prefix, "--info-fd", str(info_write), "--chdir", "/", "--", *command]
        environment = {**ENVIRONMENT, "PYTHONPATH": str(Path(__file__).parents[2])}
        if libraries := os.environ.get("LD_LIBRARY_PATH"):
            environment["LD_LIBRARY_PATH"] = libraries  # Python itself may need it to start
        try:
            self._process = subprocess.Popen(
                command,
                env=environment,
                pass_fds=[theirs.fileno(), *([info_write] if self._prefix else [])],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr_write,
                cwd=self._folder or "/",
                start_new_session=True,
            )
        finally:
            for descriptor in (info_write, stderr_write):
                os.close(descriptor)
            theirs.close()
        self.pid = self._process.pid
        self._started = loop.create_future()
        transport, _ = await loop.create_connection(lambda: _Link(self._receive, self._lose), sock=ours)
        self._transport = transport
        transport.write(pack(self._setup))
        try:
            self.ready = await asyncio.wait_for(self._started, START_SECONDS)
        except TimeoutError:
            self._lose(f"it was not ready after {START_SECONDS:g} s")
            raise ZygoteLost(f"zygote {self.pid} was not ready after {START_SECONDS:g} s") from None
        finally:
            if self._prefix:
                with contextlib.suppress(ValueError, KeyError):
                    self.pid = int(json.loads(os.read(info_read, 4096))["child-pid"])
            os.close(info_read)
        if self.ready.fatal:
            self._lose(self.ready.fatal)
            raise UserError(f"the sandbox could not lock itself in: {self.ready.fatal}", how="see `rstar doctor`")
        self.alive = True

    async def ask(self, request: Request, patience: float) -> tuple[Reply, bytes]:
        """Send a request and wait for its reply; a silent zygote is pinged, then killed."""
        if not self.alive or self._transport is None:
            raise ZygoteLost(f"zygote {self.pid} is gone")
        future: asyncio.Future[tuple[Reply, bytes]] = asyncio.get_running_loop().create_future()
        bound = 4 * request.wall_seconds * max(1, len(request.codes)) + GRACE_SECONDS
        self._pending[request.id], self._bounds[request.id] = future, time.monotonic() + bound
        if self._watch is None or self._watch.done():
            self._watch = asyncio.get_running_loop().create_task(self._watch_over(patience))
        self._transport.write(pack(request))
        try:
            return await future
        except asyncio.CancelledError:
            if self.alive:
                self._transport.write(pack(Request(request.id, "cancel")))
            raise
        finally:
            del self._pending[request.id], self._bounds[request.id]

    async def _watch_over(self, patience: float) -> None:
        """While work is in flight: an overdue reply or two silences in a row, the second after a ping, mean a wedge."""
        while self.alive and self._pending and self._transport is not None:
            before = self._heard
            await asyncio.sleep(patience)
            if any(bound < time.monotonic() for bound in self._bounds.values()):
                self._lose("a reply is overdue")
                return
            if self._heard > before or not self._pending:
                continue
            self._pings += 1
            self._transport.write(pack(Request(-self._pings, "ping")))
            await asyncio.sleep(patience)
            if self._heard == before and self._pending:
                self._lose(f"it did not answer for {2 * patience:g} s")

    def _receive(self, data: bytes) -> None:
        self._heard = time.monotonic()
        self._buffer += data
        try:
            if self._started is not None and not self._started.done():
                first = take(self._buffer, Ready)
                if first is not None:
                    self._started.set_result(first[0])
                return
            while (message := take(self._buffer, Reply)) is not None:
                future = self._pending.get(message[0].id)
                if future is not None and not future.done():
                    future.set_result(message)
        except ValueError as error:
            self._lose(f"it sent garbage: {error}")

    def _lose(self, why: str) -> None:
        self.alive = False
        error = ZygoteLost(f"zygote {self.pid} was lost: {why}{self._last_words()}")
        for future in self._waiting():
            if not future.done():
                future.set_exception(error)
        self._kill()

    def _waiting(self) -> list[asyncio.Future[Any]]:
        return [*self._pending.values(), *([self._started] if self._started is not None else [])]

    def _last_words(self) -> str:
        with contextlib.suppress(OSError):
            text = os.read(self._stderr, 65536).decode("utf-8", "replace").strip()
            if text:
                return f"; its last line: {text.splitlines()[-1]}"
        return ""

    def _kill(self) -> None:
        if self._transport is not None:
            self._transport.abort()
        if self._process is not None and self._process.poll() is None:
            if self.pid != self._process.pid:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(self.pid, 9)  # first process of its namespace: everything inside goes with it
            self._process.kill()

    async def close(self) -> None:
        """End the process and its forks; waits until it is reaped."""
        self._lose("closed")
        if self._watch is not None:
            self._watch.cancel()
        if self._process is not None:
            await asyncio.to_thread(self._process.wait)
        if self._stderr >= 0:
            os.close(self._stderr)
            self._stderr = -1
        if self._folder:
            shutil.rmtree(self._folder, ignore_errors=True)
