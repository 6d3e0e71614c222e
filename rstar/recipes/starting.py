"""What the results of a run depend on beside its sections: its seed, and what its problem files hold."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from rstar.config import ProblemsSection, RunSection
from rstar.store import file_digest


def seed_of(run: RunSection) -> dict[str, int]:
    """The part of the run section that a training reads, for its stage's settings."""
    return {"seed": run.seed}


def problem_files(section: ProblemsSection) -> dict[str, str]:
    """Digests of the files that problems are read from: a line more would move the held-out set. {} without files."""
    named = {"problems.path": section.path, "problems.heldout_path": section.heldout_path}
    files = {key: Path(path).expanduser() for key, path in named.items() if path}
    return {key: _digest(file, file.stat().st_mtime_ns) for key, file in files.items() if file.is_file()}


@lru_cache
def _digest(file: Path, changed: int) -> str:
    return file_digest(file)
