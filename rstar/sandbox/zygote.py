"""The zygote: a clean process that imports the mathematics, locks itself in, and is forked once per evaluation.

Started by the supervisor with a fixed environment and one socket; it holds no secret. Locked in, it becomes the warden
of a fork of itself, the template of all evaluations. When the socket closes it leaves, and all its forks die with it.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import importlib
import os
import resource
import signal
import sys
import time

from rstar.sandbox import locks, preload, step, template
from rstar.sandbox.frames import Ready, Setup, pack, take
from rstar.sandbox.server import Server
from rstar.sandbox.template import FIRST_LIBRARY_FD


def pin_libraries(roots: list[str], descriptors: list[int]) -> int:
    """Make libraries importable that lie under a folder the new uid may not enter (a home of root, mode 700).

    Their packages are looked up below an O_PATH descriptor opened while this was still root. Landlock grants those
    folders for reading anyway, so the descriptors open no other way. Returns how many folders needed it.
    """
    moved = {}
    for root, descriptor in zip(roots, descriptors, strict=True):
        if not os.access(root, os.R_OK | os.X_OK):
            moved[root] = f"/proc/self/fd/{descriptor}"

    def new_place(path: str) -> str:
        real = os.path.realpath(path) if not os.path.isabs(path) else path
        for root, place in sorted(moved.items(), reverse=True):
            if real == root or real.startswith(root + "/"):
                return place + real[len(root) :]
        return path

    if moved:
        sys.path[:] = [new_place(path) for path in sys.path]
        for module in list(sys.modules.values()):
            folders = getattr(module, "__path__", None)
            if isinstance(folders, list):
                module.__path__ = [new_place(folder) for folder in folders]
        sys.path_importer_cache.clear()
    return len(moved)


def prepare(control: int) -> tuple[Ready, locks.Filter | None, step.Entries]:
    """Import and lock. Every failure is reported and ends the process: it never serves half locked."""
    buffer = bytearray()
    while (message := take(buffer, Setup)) is None:
        if not (data := os.read(control, 1 << 20)):
            os._exit(0)  # the supervisor has died before it said what to do
        buffer += data
    setup = message[0]
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # an ignored SIGCHLD survives exec and would break wait4
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        started = time.perf_counter()
        sys.path[:] = [*dict.fromkeys(setup.search_path)]
        absent = [name for name in preload.LEFT_OUT if name not in sys.modules]
        for name in absent:
            sys.modules[name] = None  # type: ignore[assignment]  # importing it fails
        for name in setup.modules:
            importlib.import_module(name)
        for name in absent:
            del sys.modules[name]
        exec(setup.warm_up, {})
        entries = {}
        for name, target in setup.entries.items():
            module, _, function = target.partition(":")
            entries[name] = getattr(importlib.import_module(module), function)
        for name in ("PYTHONPATH", "PWD", "LD_LIBRARY_PATH"):  # paths of this host are nothing to a step
            os.environ.pop(name, None)
        imported = time.perf_counter()
        if len(os.listdir("/proc/self/task")) != 1:
            raise RuntimeError("a library started a thread; the locks hold for a single-threaded process only")
        step.open_stdout()
        heap = locks.writable_memory()
        filter_, unreachable = lock(setup)
        template.rehearse(entries, [control])
        gc.collect()
        gc.freeze()  # a collection in a fork must not write to, and so copy, what the zygote holds
        collapsed = locks.collapse_heap(heap)
        ready = Ready(
            landlock_abi=setup.landlock_abi,
            seccomp=setup.seccomp,
            uid=os.getuid(),
            pid=os.getpid(),
            import_ms=(imported - started) * 1e3,
            lock_ms=(time.perf_counter() - imported) * 1e3,
            resident_mib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            huge_mib=collapsed / (1 << 20),
            unreachable=unreachable,
        )
    except BaseException as error:
        os.set_blocking(control, True)
        os.write(control, pack(Ready(fatal=f"{type(error).__name__}: {error}")))
        raise
    return ready, filter_, entries


def lock(setup: Setup) -> tuple[locks.Filter | None, int]:
    """Take the locks that hold for the zygote and every fork; returns the filter that forks add."""
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # when memory runs out the kernel ends steps before engines and drivers
    roots = locks.library_roots(setup.modules)
    inside = tuple(roots)
    sys.path[:] = [path for path in sys.path if os.path.realpath(path).startswith(inside)]
    descriptors = locks.open_readable(locks.readable_paths(roots))
    pinned = []
    for number, root in enumerate(roots):
        opened = os.open(root, os.O_PATH)
        pinned.append(fcntl.fcntl(opened, fcntl.F_DUPFD, FIRST_LIBRARY_FD + number))
        os.close(opened)
    step_filter = locks.Filter(locks.step_filter()) if setup.seccomp else None
    zygote_filter = locks.Filter(locks.zygote_filter()) if setup.seccomp else None
    locks.drop_root(setup.uid)
    locks.drop_capabilities()
    unreachable = pin_libraries(roots, pinned)
    if not unreachable:
        for descriptor in pinned:
            os.close(descriptor)
    locks.limit_resources(setup.memory_bytes)
    locks.prctl(locks.PR_SET_NO_NEW_PRIVS, 1)
    locks.prctl(locks.PR_SET_DUMPABLE, 0)
    os.umask(0o077)
    if setup.landlock_abi:
        locks.landlock(descriptors, setup.landlock_abi)
    for descriptor in descriptors:
        os.close(descriptor)
    if zygote_filter is not None:
        zygote_filter.load()
    return step_filter, unreachable


def main() -> None:
    given = int(sys.argv[1])  # its number is the supervisor's: as high as that one has files open
    control = os.dup(given)  # the lowest that is free, among those that forks close
    os.close(given)
    ready, filter_, entries = prepare(control)
    handle = template.start(filter_, entries)
    os.write(control, pack(ready))
    Server(control, handle, entries, locked=filter_ is not None).serve()


if __name__ == "__main__":
    main()
