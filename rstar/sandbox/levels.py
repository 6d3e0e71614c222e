"""What a host offers and which level of assurance follows from it.

    A+      A, and namespaces of its own (bubblewrap): no other process, network or IPC is even visible
    A       Landlock ABI >= 6 and seccomp
    B       Landlock ABI 1-5 and seccomp: the same promises, some held by one lock instead of two; reduced assurance
    unsafe  no locks: a separate process with limits on time, memory and output; only on request

Never promised, at any level: kernel exploits, side channels through the CPU, `stat` of known paths, a fair share of
the CPU, honesty of a step about its own result. For truly adversarial code put a virtual machine around it.
"""

from __future__ import annotations

import functools
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from rstar.sandbox import locks
from rstar.types import UserError

FULL_ABI = 6  # signals and abstract sockets are scoped from here on

LOST = (
    "files of this user can be read and written, network and sockets opened, processes and threads started, other "
    "processes of this user signalled and read (environment and tokens too); only time, memory and output are bounded"
)
PROMISES = {
    "A+": "full assurance, and namespaces of its own",
    "A": "full assurance: Landlock and seccomp",
    "B": f"reduced assurance: this kernel's Landlock is older than ABI {FULL_ABI}, so signals, abstract sockets and "
    "(below ABI 4) TCP are denied by seccomp alone",
    "unsafe": f"NO assurance (sandbox.unsafe_local_exec): {LOST}",
}


@dataclass(frozen=True)
class Host:
    """What this machine offers. Made by `probe`; a test passes a lesser one to see how a lesser machine would do."""

    landlock_abi: int  # 0: none
    seccomp: bool  # the kernel filters system calls and libseccomp is there to name them
    namespaces: tuple[str, ...] = ()  # the bubblewrap command that works here; empty: none does
    problem: str = ""  # why a lock is missing


NO_LOCKS = Host(0, False, (), "locks switched off")


def level_of(host: Host, *, allow_unsafe: bool) -> str:
    """The best level `host` reaches. Raises UserError where there is none and no consent to run without."""
    if host.seccomp and host.landlock_abi >= FULL_ABI:
        return "A+" if host.namespaces else "A"
    if host.seccomp and host.landlock_abi >= 1:
        return "B"
    if allow_unsafe and sys.platform == "linux":
        return "unsafe"
    missing = " and ".join(
        name for name, there in (("Landlock", host.landlock_abi > 0), ("seccomp", host.seccomp)) if not there
    )
    raise UserError(
        f"no {missing} on this host ({host.problem or platform.platform()})",
        need="Linux 5.13 or later with Landlock enabled (lsm=landlock,...) and libseccomp 2.5.2 or later",
        how=f"use such a kernel, or (on Linux) --unsafe-local-exec (sandbox.unsafe_local_exec=true): then {LOST}",
    )


def _bubblewrap_command() -> tuple[str, ...]:
    program = shutil.which("bwrap")
    if program is None:
        return ()
    # The capabilities let root leave root inside; without root bubblewrap has none to give and ignores them.
    capabilities = ("CAP_SETUID", "CAP_SETGID", "CAP_DAC_READ_SEARCH") if os.geteuid() == 0 else ()
    return (
        program, "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try",
        "--as-pid-1",
        *(word for name in capabilities for word in ("--cap-add", name)),
        "--ro-bind", "/", "/", "--dev", "/dev", "--proc", "/proc",
    )  # fmt: skip


def _works(command: Sequence[str]) -> bool:
    try:
        done = subprocess.run([*command, "/bin/true"], capture_output=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


def _seccomp_problem() -> str:
    try:
        locks.zygote_filter()
        locks.step_filter()
    except Exception as error:  # a missing library, an old one, or a pyseccomp that cannot load it
        return f"libseccomp: {error}"
    return "" if _kernel_filters() else "seccomp filters are not available (prctl PR_GET_SECCOMP failed)"


def _kernel_filters() -> bool:
    try:
        with open("/proc/sys/kernel/seccomp/actions_avail") as file:
            return "errno" in file.read()
    except OSError:
        return False


@functools.cache
def probe() -> Host:
    """Look at this machine; namespaces are probed by using them. Cached: a kernel does not change under a process."""
    if sys.platform != "linux":
        return Host(0, False, (), f"{sys.platform} has neither")
    seccomp_problem, abi = _seccomp_problem(), locks.landlock_abi()
    problem = seccomp_problem
    if not problem and not abi:
        problem = "the kernel lacks Landlock, or it is not among its active security modules"
    command = _bubblewrap_command()
    return Host(abi, not seccomp_problem, command if command and _works(command) else (), problem)
