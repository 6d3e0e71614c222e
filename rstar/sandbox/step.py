"""What a fork does: run a program of steps in one namespace and say how its last step ended.

This process is untrusted from the first line of step code on: it may forge its own report, and nothing else. The
report goes through one pipe, the output of the last step through another; both are read and bounded by the zygote.
"""

from __future__ import annotations
import __future__

import builtins
import errno
import io
import marshal
import os
import random
import struct
import sys
import time
import types
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import NoReturn, TextIO

from rstar.sandbox.scratch import in_memory_open

STDOUT, REPORT, OUTPUT = 1, 3, 4  # descriptors; 0 and 2 are the null device
REPORT_HEAD = struct.Struct("=cd")  # kind, CPU seconds of this process so far
PREFIX_DONE, OK, ERROR, DENIED, MEMORY, PREFIX_FAILED = b"M", b"O", b"E", b"D", b"X", b"P"
MAX_ERROR, MAX_NAME = 2000, 200  # characters
REPORT_BYTES = 4 * MAX_ERROR + 256
Entries = Mapping[str, Callable[[str], str]]  # trusted functions by name
# CPU time is read from the thread clock (a step has one thread): under RLIMIT_CPU the process clock moves in ticks.
_open = open
FUTURE_FLAGS = 0
for _name in __future__.all_feature_names:
    FUTURE_FLAGS |= getattr(__future__, _name).compiler_flag


def _say(kind: bytes, text: str = "") -> None:
    message = REPORT_HEAD.pack(kind, time.thread_time()) + text.encode("utf-8", "backslashreplace")
    os.write(REPORT, message[:REPORT_BYTES])


def describe(error: BaseException) -> tuple[bytes, str]:
    """Kind and one line of text for what a step raised. Formatting runs the step's own code, which may raise again."""
    denied = isinstance(error, PermissionError) or (isinstance(error, OSError) and error.errno == errno.EROFS)
    kind = MEMORY if isinstance(error, MemoryError) else DENIED if denied else ERROR
    name = "exception"
    try:
        name = type(error).__name__[:MAX_NAME]
        text = str(error)[:MAX_ERROR]
    except BaseException:
        return kind, f"{name}: <no text: raised again while it was formatted>"
    line = " ".join(text.split("\n"))[:MAX_ERROR]
    return kind, f"{name}: {line}" if line else name


def _flush(stdout: TextIO) -> None:
    """Write out what was printed: to the `stdout` that the program began with and to what it has put in its place."""
    if sys.stdout is not stdout and sys.stdout is not None:
        with suppress(Exception):  # as at the end of a run of its own
            sys.stdout.flush()
    try:
        closed = stdout.closed
    except ValueError:
        return  # detached: its buffer belongs to another stream now
    if not closed:
        stdout.flush()


def open_stdout() -> None:
    """Make `sys.stdout` anew as a fresh interpreter would for a pipe, with STDOUT behind it.

    That of the zygote was made for the null device, which can seek: reopened in another encoding, it would try to.
    """
    read_end, write_end = os.pipe()
    os.dup2(write_end, STDOUT)
    raw = io.FileIO(STDOUT, "w", closefd=False)
    raw.name = "<stdout>"
    stdout = io.TextIOWrapper(io.BufferedWriter(raw), "utf-8", "backslashreplace", newline="\n")
    stdout.mode = "w"  # type: ignore[misc]
    sys.stdout = sys.__stdout__ = stdout  # type: ignore[misc]
    os.dup2(0, STDOUT)
    os.close(read_end)
    os.close(write_end)


def seed_libraries(seed: int) -> None:
    """Start the generators of random, numpy and sympy from `seed`: in the template, once for many programs with one.

    Generators of numpy that are made without a seed (`default_rng()`) take theirs from a generator of this seed too.
    """
    random.seed(seed)
    if (numpy_random := sys.modules.get("numpy.random")) is not None:
        numpy_random.seed(seed % 2**32)
        numpy_random.bit_generator.randbits = random.Random(seed).getrandbits  # `secrets.randbits` otherwise
    if (sympy_random := sys.modules.get("sympy.core.random")) is not None:
        sympy_random.seed(seed)


def _compile(codes: list[str], index: int, flags: int) -> types.CodeType:
    code = codes[index].removeprefix("\ufeff")
    if index and "__future__" in code:  # legal only where it would be legal in the whole program
        compile("\n".join([*codes[:index], code]), "<step>", "exec", dont_inherit=True)
    compiled: types.CodeType = compile(code, "<step>", "exec", flags=flags, dont_inherit=True)
    return compiled


def prepare() -> None:
    """Give this process the fresh `__main__` and the in-memory folder that its forks run their programs with."""
    main = types.ModuleType("__main__")
    main.__dict__["__builtins__"] = builtins
    sys.modules["__main__"] = main
    builtins.open = io.open = in_memory_open(_open)
    sys.argv = [""]


def pack(entry: str | None, codes: Sequence[str]) -> bytes:
    """What a fork is to run: the codes of a path, or a trusted entry with one payload."""
    return marshal.dumps((entry, list(codes)))


def run(program: bytes | bytearray, entries: Entries, leave: Callable[[int], NoReturn] = os._exit) -> NoReturn:
    """Run what `pack` made and leave. The first untrusted code of this process is that of a program in here."""
    entry, codes = marshal.loads(program)
    if entry is not None:
        run_entry(entries[entry], codes[0], leave)
    run_program(codes, leave)


def run_program(codes: list[str], leave: Callable[[int], NoReturn]) -> NoReturn:
    """Run `codes` one after another in `__main__`; only what the last one prints is kept.

    A fresh run of the codes joined by newlines does the same: one namespace, `from __future__` carried on. Ends the
    process without teardown, so that no `__del__`, atexit function or thread of the step can hold it up.
    """
    clock, namespace = time.thread_time, sys.modules["__main__"].__dict__
    stdout = sys.stdout  # UTF-8 with escapes and block buffered: see process.ENVIRONMENT
    flags, last = 0, len(codes) - 1
    try:
        for index in range(last):
            code = _compile(codes, index, flags)
            flags |= code.co_flags & FUTURE_FLAGS
            exec(code, namespace)
        _flush(stdout)
    except BaseException as error:
        _end(PREFIX_FAILED, f"the steps before failed when run again: {describe(error)[1]}", leave)
    os.dup2(OUTPUT, STDOUT)
    os.close(OUTPUT)
    os.write(REPORT, REPORT_HEAD.pack(PREFIX_DONE, clock()))
    try:
        exec(_compile(codes, last, flags), namespace)
        _flush(stdout)
    except BaseException as error:
        kind, text = describe(error)
        try:
            _flush(stdout)
        except BaseException:
            text = f"{text} (and its output could not be written)"
        _end(kind, text, leave)
    _end(OK, "", leave)


def run_entry(entry: Callable[[str], str], payload: str, leave: Callable[[int], NoReturn]) -> NoReturn:
    """Run a trusted function on untrusted text; its result is the output."""
    os.write(REPORT, REPORT_HEAD.pack(PREFIX_DONE, time.thread_time()))
    try:
        result = entry(payload).encode("utf-8", "backslashreplace")
        while result:
            result = result[os.write(OUTPUT, result) :]
    except BaseException as error:
        _end(*describe(error), leave)
    _end(OK, "", leave)


def _end(kind: bytes, text: str, leave: Callable[[int], NoReturn]) -> NoReturn:
    try:
        _say(kind, text)
    finally:
        leave(0)
