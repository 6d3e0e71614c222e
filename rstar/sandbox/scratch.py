"""A private in-memory folder for steps that write a file and read it back. No file of the host is ever touched.

The kernel denies a step every write; this stands in for the working folder, as a convenience and not as a lock.
Names without a folder only; the bytes count against the step's memory, and their sum is bounded here.
"""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Callable
from typing import Any

MAX_BYTES = 8 << 20
# What a step may write to but not open for writing, and its descriptors of it; standard error is the null device.
STREAMS = {"/dev/stdout": 1, "/dev/stderr": 2, os.devnull: 2}
MAX_FILES = 64


class _File(io.BytesIO):
    """One open file: what it holds is put back into the folder when it is flushed or closed."""

    def __init__(self, folder: dict[str, bytes], name: str, content: bytes, mode: str) -> None:
        super().__init__(content)
        self._folder, self.name, self._mode = folder, name, mode
        if "a" in mode:
            self.seek(0, io.SEEK_END)

    def readable(self) -> bool:
        return "r" in self._mode or "+" in self._mode

    def writable(self) -> bool:
        return self._mode.strip("bt") != "r"

    def write(self, data: Any, /) -> int:
        if not self.writable():
            raise io.UnsupportedOperation("not writable")
        others = sum(len(content) for name, content in self._folder.items() if name != self.name)
        if others + self.tell() + memoryview(data).nbytes > MAX_BYTES:
            raise OSError(errno.ENOSPC, f"more than {MAX_BYTES >> 20} MiB of files", self.name)
        return super().write(data)

    def flush(self) -> None:
        if not self.closed and self.writable():
            self._folder[self.name] = self.getvalue()

    def close(self) -> None:
        self.flush()
        super().close()


def in_memory_open(real_open: Callable[..., Any]) -> Callable[..., Any]:
    """`open` which keeps written files of the working folder in memory and hands everything else to `real_open`."""
    folder: dict[str, bytes] = {}

    def open(
        file: Any,
        mode: str = "r",
        buffering: int = -1,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
        closefd: bool = True,
        opener: Any = None,
    ) -> Any:
        name = os.fspath(file) if isinstance(file, (str, os.PathLike)) else None
        writes = isinstance(mode, str) and bool(set(mode) & set("wax+"))
        if writes and name in STREAMS:
            return real_open(os.dup(STREAMS[name]), mode, buffering, encoding, errors, newline)
        if not isinstance(name, str) or "/" in name or opener is not None or not (name in folder or writes):
            return real_open(file, mode, buffering, encoding, errors, newline, closefd, opener)
        if "x" in mode and name in folder:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), name)
        if "r" in mode and name not in folder:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
        if name not in folder and len(folder) >= MAX_FILES:
            raise OSError(errno.ENOSPC, f"more than {MAX_FILES} files", name)
        raw = _File(folder, name, b"" if set(mode) & set("wx") else folder.get(name, b""), mode.replace("b", ""))
        raw.flush()
        if "b" in mode:
            return raw
        return io.TextIOWrapper(raw, encoding or "utf-8", errors, newline)

    return open
