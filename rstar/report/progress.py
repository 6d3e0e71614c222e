"""Live progress: one line that is rewritten on a terminal, plain lines every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from collections import Counter
from types import TracebackType
from typing import TextIO

from rstar.search.collect import ProblemSummary
from rstar.types import TrainProgress

PLAIN_SECONDS = 10.0  # between lines where there is no terminal
LIVE_SECONDS = 0.2


class Line:
    """Prints states of one line."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stdout
        self._live = self._stream.isatty()
        self._last = 0.0
        self.begun = time.monotonic()

    def show(self, text: str, *, final: bool = False) -> None:
        """Print `text` if it is time to, or if it is the line's last state."""
        now = time.monotonic()
        if not final and now - self._last < (LIVE_SECONDS if self._live else PLAIN_SECONDS):
            return
        self._last = now
        if self._live:
            self._stream.write("\r\x1b[2K" + text + ("\n" if final else ""))
        else:
            self._stream.write(text + "\n")
        self._stream.flush()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.begun


class SearchProgress:
    """Problems done, solved % so far, tokens/s, ETA. Called with each finished problem."""

    def __init__(self, title: str, *, total: int, already: int) -> None:
        self.title, self.total, self.done = title, total, already
        self.already = already
        self.solved = self.tokens = 0
        self.outcomes: Counter[str] = Counter()
        self.line = Line()

    def __call__(self, summary: ProblemSummary) -> None:
        self.done += 1
        self.solved += summary.solved
        self.tokens += summary.tokens
        self.outcomes.update(summary.outcomes)
        self.line.show(self._text())

    def __enter__(self) -> SearchProgress:
        resumed = f", {self.already} already done" if self.already else ""
        self.line.show(f"{self.title}: {self.total} problems{resumed}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.line.show(self._text(), final=True)

    def _text(self) -> str:
        new = self.done - self.already
        rate = new / max(self.line.seconds, 1e-9)
        eta = (
            f"{(self.total - self.done) / rate:.0f} s left"
            if rate and self.done < self.total
            else f"{self.line.seconds:.0f} s"
        )
        failed = self.outcomes["code_error"] + self.outcomes["malformed"]
        steps = sum(self.outcomes.values())
        return (
            f"{self.title}: {self.done}/{self.total}  solved {self.solved / max(1, new):.0%}  "
            f"{self.tokens / max(self.line.seconds, 1e-9):.0f} tok/s  "
            f"steps {steps} ({failed / max(1, steps):.0%} failed)  {eta}"
        )


class TrainingProgress:
    """Steps done, loss, ETA. Called with each optimizer step."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.line = Line()
        self._text = f"{title}: loading"

    def __call__(self, progress: TrainProgress) -> None:
        rate = self.line.seconds / max(1, progress.step)
        self._text = (
            f"{self.title}: step {progress.step}/{progress.steps}  loss {progress.loss:.3f}  "
            f"{(progress.steps - progress.step) * rate:.0f} s left"
        )
        self.line.show(self._text)

    def __enter__(self) -> TrainingProgress:
        self.line.show(self._text)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.line.show(f"{self._text}  ({self.line.seconds:.0f} s)", final=True)
