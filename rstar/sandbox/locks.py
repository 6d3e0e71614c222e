"""The kernel locks of a zygote and of the forks that run steps: uid, rlimits, Landlock, seccomp.

All of them are inherited by fork and none can be undone. Every system call is named and resolved by libseccomp, so the
same lists hold on x86-64 and aarch64; what libseccomp does not know stays denied, because the filter is an allow-list.
The zygote takes the uid, the rlimits, Landlock and the first filter once; each fork adds a second, small filter which
takes away what only the zygote may do (fork, signal, change limits).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import re
import resource
import signal
import socket
import stat
import struct
import sys
import sysconfig
import termios
from collections.abc import Callable, Iterable, Sequence

# prctl options: linux/prctl.h, the same on every architecture.
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
SECCOMP_MODE_FILTER = 2

CAPABILITY_VERSION_3 = 0x20080522  # linux/capability.h

# Landlock rights: linux/landlock.h. A ruleset handles every right its ABI knows, so all of them are denied by default.
FS_WRITE_FILE, FS_READ_FILE, FS_READ_DIR = 1 << 1, 1 << 2, 1 << 3
FS_RIGHTS_BY_ABI = ((1, 13), (2, 14), (3, 15), (5, 16))  # (first ABI, number of file-system rights it handles)
NET_BIND_TCP_CONNECT_TCP = 0b11  # ABI 4
SCOPE_ABSTRACT_UNIX_SIGNAL = 0b11  # ABI 6
RULE_PATH_BENEATH = 1
NULL_DEVICE = os.makedev(1, 3)  # Documentation/admin-guide/devices.txt
CREATE_RULESET_VERSION = 1

# Uids that nobody has (systemd hands this range out dynamically), one per supervisor, so that the sandboxes of a node
# are strangers to each other; "nobody" is for containers with a small uid map.
FIRST_UID, UIDS, NOBODY = 61440, 2048, 65534
OPEN_FILES = 64

# What a step may call. No socket, no fork, no exec, no signal to anyone, no change of files, owners, modes or times
# (Landlock does not cover the last three), no memfd (it escapes RLIMIT_AS), no io_uring (it escapes seccomp).
_STEP_CALLS = """
read write readv writev pread64 pwrite64 preadv pwritev lseek close close_range dup dup2 dup3 open openat stat fstat
lstat newfstatat statx access faccessat faccessat2 readlink readlinkat getcwd chdir fchdir getdents64 umask mmap munmap
mremap mprotect madvise brk rt_sigaction rt_sigprocmask rt_sigreturn rt_sigpending rt_sigsuspend rt_sigtimedwait
sigaltstack futex set_robust_list get_robust_list rseq set_tid_address membarrier sched_yield sched_getaffinity getpid
gettid getppid getpgrp getpgid getsid getuid geteuid getgid getegid getresuid getresgid getgroups getrandom
clock_gettime clock_getres clock_nanosleep nanosleep gettimeofday time uname sysinfo getrusage times getrlimit exit
exit_group pipe pipe2 poll ppoll select pselect6 epoll_create1 epoll_ctl epoll_wait epoll_pwait eventfd2 recvfrom
shutdown alarm setitimer getitimer pause wait4 waitid restart_syscall
"""
STEP_CALLS = re.findall(r"\w+", _STEP_CALLS)

# fcntl commands a step may use. The others reach outside: F_SETOWN with F_SETSIG sends any signal to any process of
# the same uid, F_SETPIPE_SZ takes kernel memory that no limit counts.
STEP_FCNTL = (fcntl.F_DUPFD, fcntl.F_DUPFD_CLOEXEC, fcntl.F_GETFD, fcntl.F_SETFD, fcntl.F_GETFL, fcntl.F_SETFL)
STEP_IOCTL = (termios.TCGETS, termios.TIOCGWINSZ, termios.FIONREAD, termios.FIONBIO, termios.FIOCLEX, termios.FIONCLEX)

# Flags of open that a step may not pass. Landlock asks by the access mode, and below ABI 3 not about O_TRUNC: mode 3,
# which is neither reading nor writing, opens every file and with O_TRUNC empties it.
WRITING = (os.O_WRONLY, os.O_RDWR, os.O_CREAT, os.O_TRUNC)

# What the zygote calls besides, and each fork gives up before it runs a step.
ZYGOTE_CALLS = ("clone", "kill", "prctl", "seccomp", "prlimit64", "sendmsg", "recvmsg")
CLONE_PARENT = 0x00008000  # linux/sched.h
CLONE_NUMBERS = {"x86_64": 56, "aarch64": 220}  # where libseccomp is not there to name the call
CLONE_FORBIDDEN = 0x7E020000 | 0x00010000 | 0x00000100  # new namespaces, threads, shared memory: linux/sched.h

HUGE_PAGE = 2 << 20  # bytes; where it is another size the kernel refuses to collapse, which costs nothing
MADV_COLLAPSE = 25  # asm-generic/mman-common.h

libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long


def _checked(result: int, what: str) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
    return result


def prctl(option: int, *arguments: int) -> None:
    padded = [ctypes.c_ulong(value) for value in (*arguments, 0, 0, 0, 0)[:4]]
    _checked(libc.prctl(ctypes.c_int(option), *padded), f"prctl {option}")


# What every fork calls, with arguments made beforehand: each Python object that a fork touches is a page it must copy.
_DIE_WITH_PARENT = (ctypes.c_int(PR_SET_PDEATHSIG), ctypes.c_ulong(signal.SIGKILL), *[ctypes.c_ulong(0)] * 3)


def die_with_parent() -> None:
    """Have this process killed when its parent ends. OSError if the kernel objects."""
    _checked(libc.prctl(*_DIE_WITH_PARENT), "PR_SET_PDEATHSIG")


def _number(name: str) -> int:
    import pyseccomp

    number: int = pyseccomp.resolve_syscall(pyseccomp.Arch.NATIVE, name)
    if number < 0:
        raise OSError(errno.ENOSYS, f"{name}: libseccomp is too old to know it")
    return number


def _syscall(name: str, *arguments: ctypes.c_long | ctypes.c_char_p) -> int:
    return _checked(libc.syscall(ctypes.c_long(_number(name)), *arguments), name)


def forker(*, sibling: bool) -> Callable[[], int]:
    """A fork for a process with a single thread; as a `sibling` the new process is a child of this one's parent.

    Unlike `os.fork` it runs none of Python's at-fork hooks. Those replace locks that other threads may hold (there are
    none) and reseed `random` from fresh entropy (a step has its own seed); they touch more pages than everything else
    that a fork does until it runs a step.
    """
    clone = ctypes.PyDLL(None, use_errno=True).syscall
    clone.restype = ctypes.c_long
    flags = signal.SIGCHLD | (CLONE_PARENT if sibling else 0)
    try:
        number = _number("clone")
    except (ImportError, OSError, RuntimeError):  # no libseccomp: level unsafe, which has no filter to agree with
        number = CLONE_NUMBERS[os.uname().machine]
    arguments = (ctypes.c_long(number), ctypes.c_ulong(flags), *[ctypes.c_ulong(0)] * 4)
    return lambda: _checked(clone(*arguments), "clone")


def landlock_abi() -> int:
    """The kernel's Landlock ABI version; 0 where there is none (or libseccomp cannot name its calls)."""
    try:
        return _syscall(
            "landlock_create_ruleset", ctypes.c_char_p(None), ctypes.c_long(0), ctypes.c_long(CREATE_RULESET_VERSION)
        )
    except (OSError, ImportError, RuntimeError):
        return 0


def open_readable(paths: Iterable[str]) -> list[int]:
    """O_PATH descriptors of those paths that exist; opened before the uid changes, which may close the way to them."""
    found = []
    for path in sorted(set(paths)):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError, PermissionError):
            found.append(os.open(path, os.O_PATH | os.O_CLOEXEC))
    return found


def landlock(readable: Sequence[int], abi: int) -> None:
    """Deny this process and its children every file, TCP port, signal and abstract socket, except reading `readable`.

    The null device may be written to as well, by what opens it before a fork's own filter denies that (`step_filter`).
    Needs no_new_privs and a single thread (below ABI 8 the calling thread alone is restricted).
    """
    handled = (1 << next(count for first, count in reversed(FS_RIGHTS_BY_ABI) if abi >= first)) - 1
    size = 24 if abi >= 6 else 16 if abi >= 4 else 8
    attributes = struct.pack("=QQQ", handled, NET_BIND_TCP_CONNECT_TCP, SCOPE_ABSTRACT_UNIX_SIGNAL)[:size]
    ruleset = _syscall("landlock_create_ruleset", ctypes.c_char_p(attributes), ctypes.c_long(size), ctypes.c_long(0))
    for descriptor in readable:
        found = os.fstat(descriptor)
        rights = FS_READ_FILE | FS_READ_DIR if stat.S_ISDIR(found.st_mode) else FS_READ_FILE
        if stat.S_ISCHR(found.st_mode) and found.st_rdev == NULL_DEVICE:
            rights |= FS_WRITE_FILE
        rule = ctypes.c_char_p(struct.pack("=Qi", rights, descriptor))
        _syscall("landlock_add_rule", ctypes.c_long(ruleset), ctypes.c_long(RULE_PATH_BENEATH), rule, ctypes.c_long(0))
    _syscall("landlock_restrict_self", ctypes.c_long(ruleset), ctypes.c_long(0))
    os.close(ruleset)


def library_roots(modules: Iterable[str]) -> list[str]:
    """Folders of Python's own libraries: standard library, site-packages, and packages loaded from elsewhere."""
    roots = {
        os.path.realpath(path)
        for key in ("stdlib", "platstdlib", "purelib", "platlib")
        if (path := sysconfig.get_path(key))
    }
    for name in modules:
        source = getattr(sys.modules.get(name.partition(".")[0]), "__file__", None)
        if source and os.path.basename(source).startswith("__init__."):
            folder = os.path.dirname(os.path.realpath(source))
            if not any(os.path.commonpath((folder, root)) == root for root in roots):
                roots.add(folder)
    return sorted(path for path in roots if os.path.isdir(path))


def readable_paths(roots: Iterable[str]) -> list[str]:
    """Everything a step may read: the library roots, folders of the shared libraries already loaded, time zones."""
    with open("/proc/self/maps") as maps:
        mapped = {line.split(maxsplit=5)[5].strip() for line in maps if line.count("/")}
    shared = {os.path.dirname(os.path.realpath(path)) for path in mapped if ".so" in os.path.basename(path)}
    system = {"/etc/ld.so.cache", "/etc/localtime", "/usr/share/zoneinfo", "/dev/null", "/dev/zero", "/dev/urandom"}
    return sorted({*roots, *shared, *system})


def sandbox_uid(supervisor: int) -> int:
    """The uid that the zygotes of the supervisor with this pid drop to when it is root."""
    return FIRST_UID + supervisor % UIDS


def drop_root(uid: int) -> None:
    """Become `uid` (or nobody) for good; capabilities go with root. Nothing to do for other users."""
    if os.geteuid() != 0 and os.getuid() != 0:
        return
    os.setgroups([])
    try:
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    except OSError:
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)


def drop_capabilities() -> None:
    """Give up every capability, those of an unprivileged user with ambient ones too. OSError if the kernel objects."""
    header = struct.pack("=Ii", CAPABILITY_VERSION_3, 0)
    nothing = bytes(24)  # effective, permitted and inheritable sets, twice 32 bits each
    _checked(libc.capset(ctypes.c_char_p(header), ctypes.c_char_p(nothing)), "capset")


def limit_resources(memory_bytes: int) -> None:
    """Hard limits that hold for every fork: `memory_bytes` on top of what the zygote has mapped, no file writing."""
    with open("/proc/self/statm") as statm:
        mapped = int(statm.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    for kind, value in (
        (resource.RLIMIT_AS, mapped + memory_bytes),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, OPEN_FILES),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
    ):
        resource.setrlimit(kind, (value, value))


def writable_memory() -> list[tuple[int, int]]:
    """(start, end) of this process's private anonymous memory, in whole huge pages."""
    found = []
    with open("/proc/self/maps") as maps:
        for line in maps:
            span, rights, _, _, inode, *name = line.split()
            if rights.startswith("rw-p") and inode == "0" and name in ([], ["[heap]"]):
                start, end = (int(bound, 16) for bound in span.split("-"))
                start, end = -(-start // HUGE_PAGE) * HUGE_PAGE, end // HUGE_PAGE * HUGE_PAGE
                if start < end:
                    found.append((start, end))
    return found


def collapse_heap(spans: Iterable[tuple[int, int]]) -> int:
    """Put those spans into huge pages where the kernel can (6.1 and later); returns the bytes for which it did.

    A fork copies the page tables of all memory that was written to, and its end takes them down again: with huge pages
    that is half of the cost of an evaluation.
    """
    done = 0
    for start, end in spans:
        for page in range(start, end, HUGE_PAGE):
            if libc.madvise(ctypes.c_void_p(page), ctypes.c_size_t(HUGE_PAGE), MADV_COLLAPSE) == 0:
                done += HUGE_PAGE
    return done


def _export(rules: object) -> bytes:
    read_end, write_end = os.pipe()  # a program is a few KiB and fits; a file might not be writable here
    with open(read_end, "rb") as reader:
        with open(write_end, "wb") as writer:
            rules.export_bpf(writer)  # type: ignore[attr-defined]
        return reader.read()


def zygote_filter() -> bytes:
    """BPF of the allow-list: STEP_CALLS plus what the zygote needs. Everything else fails with EPERM."""
    import pyseccomp as s

    rules = s.SyscallFilter(s.ERRNO(errno.EPERM))

    def allow(name: str, *arguments: object) -> None:
        if s.resolve_syscall(s.Arch.NATIVE, name) >= 0:  # an architecture without the call has nothing to allow
            rules.add_rule(s.ALLOW, name, *arguments)

    for name in STEP_CALLS:
        allow(name)
    for command in STEP_FCNTL:
        allow("fcntl", s.Arg(1, s.EQ, command))
    for request in STEP_IOCTL:
        allow("ioctl", s.Arg(1, s.EQ, request))
    allow("socketpair", s.Arg(0, s.EQ, socket.AF_UNIX))  # asyncio's self-pipe
    allow("sendto", s.Arg(4, s.EQ, 0))  # without an address: one would reach any socket of the host that has a path
    allow("clone", s.Arg(0, s.MASKED_EQ, CLONE_FORBIDDEN, 0))
    allow("prlimit64", s.Arg(0, s.EQ, 0))
    for name in ("kill", "prctl", "seccomp", "sendmsg", "recvmsg"):
        allow(name)
    rules.add_rule(s.ERRNO(errno.ENOSYS), "clone3")  # its flags lie in memory, unseen by filters: glibc falls back
    return _export(rules)


def step_filter() -> bytes:
    """BPF of the filter a fork adds: what the zygote alone may do is denied. Strictest of both filters wins."""
    import pyseccomp as s

    rules = s.SyscallFilter(s.ALLOW)
    denied = s.ERRNO(errno.EPERM)
    for name in ZYGOTE_CALLS:
        if name == "prlimit64":
            rules.add_rule(denied, name, s.Arg(2, s.NE, 0))  # reading one's own limits stays
        else:
            rules.add_rule(denied, name)
    for name, place in (("open", 1), ("openat", 2)):
        if s.resolve_syscall(s.Arch.NATIVE, name) >= 0:
            for flag in WRITING:
                rules.add_rule(denied, name, s.Arg(place, s.MASKED_EQ, flag, flag))
    return _export(rules)


class Filter:
    """A BPF program kept in memory at a fixed address, so that loading it is one system call."""

    def __init__(self, program: bytes) -> None:
        self._program = ctypes.create_string_buffer(program, len(program))
        header = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(self._program))  # struct sock_fprog
        self._header = ctypes.create_string_buffer(header, len(header))
        self._arguments = (
            ctypes.c_int(PR_SET_SECCOMP),
            ctypes.c_ulong(SECCOMP_MODE_FILTER),
            ctypes.c_ulong(ctypes.addressof(self._header)),
            ctypes.c_ulong(0),
            ctypes.c_ulong(0),
        )

    def load(self) -> None:
        _checked(libc.prctl(*self._arguments), "seccomp filter")
