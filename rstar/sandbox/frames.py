"""Messages between supervisor and zygote: a length, a JSON header, raw bytes. Never pickle: a zygote is not trusted."""

from __future__ import annotations

import json
import os
import struct
import sys
from dataclasses import dataclass, field
from typing import TypeVar

from rstar.types import Execution, ExecutionStatus

KERNEL_KILLED = "kernel"  # a reply's status where the kernel ended a fork, out of memory: an answer to nothing
LENGTHS = struct.Struct("=II")  # bytes of the header, bytes of the body
MAX_HEADER, MAX_BODY = 64 << 20, 64 << 20


@dataclass(frozen=True)
class Setup:
    """First message to a zygote."""

    modules: list[str]  # imported before the locks
    warm_up: str  # run once before the locks, to fill caches
    entries: dict[str, str]  # name -> "module:function" that `call` may run
    memory_bytes: int
    uid: int  # what to become instead of root
    landlock_abi: int  # 0: no Landlock
    seccomp: bool
    search_path: list[str] = field(default_factory=lambda: [os.path.abspath(path) for path in sys.path])  # for imports


@dataclass(frozen=True)
class Ready:
    """First message of a zygote."""

    fatal: str = ""  # why it gave up; empty: the locks are on
    landlock_abi: int = 0
    seccomp: bool = False
    uid: int = 0
    pid: int = 0
    import_ms: float = 0.0
    lock_ms: float = 0.0
    resident_mib: float = 0.0
    huge_mib: float = 0.0  # memory in huge pages, which a fork need not copy the page tables of
    unreachable: int = 0  # library folders that only their descriptors reach after root was dropped


@dataclass(frozen=True)
class Request:
    """One thing for a zygote to do: "run", "call", "cancel", "ping", "forks" (bare locked forks, for the benchmark)."""

    id: int
    kind: str
    codes: list[str] = field(default_factory=list)  # run: the prefix, then the new code; call: [function, payload]
    seed: int = 0
    cpu_seconds: float = 0.0
    wall_seconds: float = 0.0
    output_bytes: int = 0


@dataclass(frozen=True)
class Reply:
    """How it ended; the body holds what was printed."""

    id: int
    status: str = "ok"  # a value of ExecutionStatus, or KERNEL_KILLED
    error: str = ""
    cpu_ms: float = 0.0  # of the new code alone
    prefix_cpu_ms: float = 0.0
    seconds: float = 0.0  # "forks": how long they took

    def execution(self, printed: bytes) -> Execution:
        """What the rest of the project sees."""
        text = printed.decode("utf-8", "backslashreplace")
        return Execution(ExecutionStatus(self.status), text, self.error, self.cpu_ms)


Message = Setup | Ready | Request | Reply
M = TypeVar("M", Setup, Ready, Request, Reply)


def pack(message: Message, body: bytes = b"") -> bytes:
    header = json.dumps(vars(message)).encode()  # ASCII only: lone surrogates of model text survive as escapes
    return LENGTHS.pack(len(header), len(body)) + header + body


def take(buffer: bytearray, kind: type[M]) -> tuple[M, bytes] | None:
    """Remove one whole message from the front of `buffer`; None when there is none yet. ValueError if it is garbage."""
    if len(buffer) < LENGTHS.size:
        return None
    header_size, body_size = LENGTHS.unpack_from(buffer)
    if header_size > MAX_HEADER or body_size > MAX_BODY:
        raise ValueError(f"message of {header_size} + {body_size} bytes")
    start, end = LENGTHS.size + header_size, LENGTHS.size + header_size + body_size
    if len(buffer) < end:
        return None
    try:
        message = kind(**json.loads(buffer[LENGTHS.size : start]))
    except TypeError as error:
        raise ValueError(f"not a {kind.__name__}: {error}") from error
    body = bytes(buffer[start:end])
    del buffer[:end]
    return message, body
