"""Self-checks: small attacks on the running sandbox. They run at every start, and nothing else runs if one succeeds."""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from rstar.sandbox.process import ENVIRONMENT
from rstar.types import Execution, ExecutionStatus, UserError


class Attackable(Protocol):
    """A started sandbox (rstar.sandbox.Sandbox), as far as it is attacked."""

    level: str

    async def run_limited(self, code: str, cpu_seconds: float) -> Execution:
        """Run one program by itself with a CPU limit of its own."""
        ...


class Check(NamedTuple):
    """One line of `rstar doctor`."""

    name: str
    ok: bool
    detail: str


@dataclass(frozen=True)
class _Attack:
    name: str
    code: str
    held: Callable[[Execution], bool]
    cpu_seconds: float = 2.0


def _status(*expected: ExecutionStatus) -> Callable[[Execution], bool]:
    return lambda execution: execution.status in expected


def _prints(text: str) -> Callable[[Execution], bool]:
    return lambda execution: execution.status is ExecutionStatus.OK and execution.stdout == text


_DENIED = _status(ExecutionStatus.DENIED)


def _attacks(secret_file: str, folder: str) -> list[_Attack]:
    target = os.path.join(folder, "written")
    return [
        _Attack("network", "import socket\nsocket.socket()", _DENIED),
        _Attack(
            "send to a socket's path",
            "import socket\nsocket.socketpair(type=socket.SOCK_DGRAM)[0].sendto(b'x', '/run/systemd/journal/socket')",
            _DENIED,
        ),
        _Attack(
            "let a step read Python's libraries (if not: chmod -R a+rX their folders)",
            "from importlib.machinery import PathFinder\n"
            "for name in ('wave', 'sympy'): open(PathFinder.find_spec(name).origin).read(1)",
            _status(ExecutionStatus.OK),
        ),
        _Attack("read a file", f"print(open({secret_file!r}).read())", _DENIED),
        _Attack("list a folder", f"import os\nprint(os.listdir({folder!r}))", _DENIED),
        _Attack("write a file", f"import os\nos.open({target!r}, os.O_WRONLY | os.O_CREAT)", _DENIED),
        _Attack("empty a file", f"import os\nos.open({secret_file!r}, 3 | os.O_TRUNC)", _DENIED),
        _Attack("open a device", "import os\nos.open('/dev/ptmx', 3)", _DENIED),
        _Attack("remove a file", f"import os\nos.unlink({secret_file!r})", _DENIED),
        _Attack("start a process", "import os\nif os.fork() == 0: os._exit(0)", _DENIED),
        _Attack("execute a program", "import os\nos.execv('/bin/true', ['true'])", _DENIED),
        _Attack(
            "start a thread",
            "import threading\nthreading.Thread(target=print).start()",
            _status(ExecutionStatus.ERROR, ExecutionStatus.DENIED),
        ),
        _Attack("signal the zygote", "import os\nos.kill(os.getppid(), 0)", _DENIED),
        _Attack(
            "trace the zygote",
            "import ctypes, os\nlibc = ctypes.CDLL(None)\nprint(libc.ptrace(16, os.getppid(), 0, 0))",
            _prints("-1\n"),
        ),
        _Attack(
            "see the environment",
            "import os\nprint(sorted(os.environ))\nprint(open('/proc/self/environ').read())",
            lambda execution: (
                execution.status is ExecutionStatus.DENIED and execution.stdout == f"{sorted(ENVIRONMENT)}\n"
            ),
        ),
        _Attack("be root", "import os\nprint(0 in os.getresuid())", _prints("False\n")),
        _Attack("take memory", "x = bytearray(1 << 40)", _status(ExecutionStatus.MEMORY)),
        _Attack("run for ever", "while True: pass", _status(ExecutionStatus.TIMEOUT), cpu_seconds=0.2),
        _Attack("print without end", "while True: print('x' * 4096)", _status(ExecutionStatus.OUTPUT_LIMIT)),
        _Attack("leave early", "import os\nos._exit(0)", _status(ExecutionStatus.KILLED)),
        _Attack("poison the next step", "import builtins\nbuiltins.print = None", _status(ExecutionStatus.OK)),
    ]  # fmt: skip


async def attack(sandbox: Attackable) -> list[Check]:
    """Run every attack on a started sandbox, then an innocent step."""
    folder = tempfile.mkdtemp(prefix="rstar-check-")
    secret_file = os.path.join(folder, "secret")
    try:
        os.chmod(folder, 0o777)  # the ordinary permissions allow everything here: only the locks can deny it
        with open(secret_file, "w") as file:
            file.write(secrets.token_hex(8))
        os.chmod(secret_file, 0o666)
        attacks = _attacks(secret_file, folder)
        ran = await asyncio.gather(*(sandbox.run_limited(one.code, one.cpu_seconds) for one in attacks))
        checks = [Check(one.name, one.held(seen), _detail(seen)) for one, seen in zip(attacks, ran, strict=True)]
        if os.listdir(folder) != ["secret"]:
            checks.append(Check("leave a file", False, f"found {os.listdir(folder)}"))
        innocent = await sandbox.run_limited("print(6 * 7)", 2.0)
        checks.append(Check("an innocent step", _prints("42\n")(innocent), _detail(innocent)))
        return checks
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _detail(execution: Execution) -> str:
    return f"{execution.status.value}{': ' + execution.error if execution.error else ''}"[:200]


async def require_locks(sandbox: Attackable) -> None:
    """Raise UserError unless every lock of the sandbox's level holds. Level unsafe has none to check."""
    if sandbox.level == "unsafe":
        return
    failed = [check for check in await attack(sandbox) if not check.ok]
    if failed:
        what = "; ".join(f"{check.name} gave {check.detail}" for check in failed)
        raise UserError(
            f"the sandbox does not hold on this host: {what}",
            need="every self-check to hold",
            how="see `rstar doctor`; nothing was run",
        )
