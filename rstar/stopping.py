"""How a driver and the stage it has started stop together.

SIGTERM and SIGUSR1 (a scheduler's notice that the time is nearly up) and Ctrl-C stop the driver at once: the stage ends
its engines, sandbox and workers, what is finished is on disk already, and the same command goes on from there. A driver
that was told to stop ends with REQUEUE, which means: start me again.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Sequence

REQUEUE = 75  # exit code EX_TEMPFAIL of sysexits.h: nothing is wrong, try again later
PR_SET_PDEATHSIG = 1  # of prctl
STOP_SECONDS = 30  # for a stage to end by itself


def stop_on_signals() -> None:
    """In a driver: from now on SIGTERM and SIGUSR1 raise KeyboardInterrupt with the signal's name, once."""

    def stop(number: int, _: object) -> None:
        for one in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(one, signal.SIG_IGN)
        raise KeyboardInterrupt(signal.Signals(number).name)

    for one in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(one, stop)


def stop_with_driver() -> None:
    """In a stage's process: SIGTERM from its driver ends it as Ctrl-C would; when the driver died, at once."""
    driver = os.getppid()

    def stop(*_: object) -> None:
        if os.getppid() != driver:  # another driver may take the run's folder at any moment
            os._exit(1)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.alarm(STOP_SECONDS - 5)
        signal.raise_signal(signal.SIGINT)

    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells start background jobs with SIGINT ignored
    signal.signal(signal.SIGTERM, stop)


def run_stage(command: Sequence[str]) -> int:
    """Run a stage in a process of its own and return its exit code; it ends with this process, however that ends.

    A process group of its own: Ctrl-C in a terminal reaches it through us, once. A second Ctrl-C kills it.
    """
    process = subprocess.Popen(command, preexec_fn=end_with_parent, process_group=0)
    try:
        return process.wait()
    except KeyboardInterrupt:
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            process.kill()
            process.wait()
        raise


def end_with_parent() -> None:
    """For a new process (`preexec_fn`): it is terminated when the process that started it dies, however that is."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
