"""Live progress of a stage: redrawn in place by rich on a terminal, plain lines every few seconds elsewhere.

The same state goes to a file of the run, where `rstar status` finds it from another shell.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from math import inf
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TextIO

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.live import Live

    from rstar.search.worker import ProblemSummary
    from rstar.types import TrainProgress

PLAIN_SECONDS = 10.0  # between lines where there is no terminal
KEPT_SECONDS = 1.0  # between states in the file
REDRAWS = 2  # a second
FEW = 10  # problems or steps, before which no end is foretold

_kept: tuple[Path, dict[str, Any]] | None = None


def keep_in(path: Path, *, number: int, stage: str) -> None:
    """From now on this process notes its progress, as that of `stage` of round `number`, in a JSON file."""
    global _kept
    _kept = (path, {"round": number, "stage": stage})


class Progress:
    """How far a stage is: use as a context. `figures` are what `words` can say.

    Args:
        title: Of the stage.
        total: Problems, or optimizer steps; 0 while it is not known.
        already: Done by an earlier start of the stage.
    """

    def __init__(self, title: str, *, total: int = 0, already: int = 0, stream: TextIO | None = None) -> None:
        self.title, self.total, self.done, self.already = title, total, already, already
        self.figures: dict[str, Any] = {}
        self.begun = time.monotonic()
        self._mark: tuple[float, int] | None = None  # (time, done): the rate is that of the work since then
        self._stream = stream or sys.stdout
        self._live: Live | None = None
        self._printed = self._noted = self.begun

    def update(self, done: int, **figures: Any) -> None:
        """`done` of the total are done now, and these are the figures so far."""
        self.done, self.figures = done, figures
        now = time.monotonic()
        if self._live is None and done < self.total and now - self._printed >= PLAIN_SECONDS:
            self._print()  # the last state comes with the end
        if now - self._noted >= KEPT_SECONDS:
            self._note()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.begun

    def state(self) -> dict[str, Any]:
        """title, done, total, already, seconds, eta_seconds (None: not known) and figures; plain JSON."""
        since, before = self._mark or (self.begun, self.already)
        new, left = self.done - before, self.total - self.done
        few = new < min(FEW, (self.total - before) / 10)  # the first of those that were begun together say nothing
        eta = (time.monotonic() - since) * left / new if new and left > 0 and not few else None
        return {
            "title": self.title, "done": self.done, "total": self.total, "already": self.already,
            "seconds": round(self.seconds, 2), "eta_seconds": eta and round(eta, 1), "figures": self.figures,
        }  # fmt: skip

    def __enter__(self) -> Self:
        self._note()
        if self._stream.isatty():
            from rich.console import Console
            from rich.live import Live

            console = Console(file=self._stream)
            self._live = Live(console=console, get_renderable=self._drawn, refresh_per_second=REDRAWS)
            self._live.start()
        else:
            resumed = f", {self.already} already done" if self.already else ""
            print(f"{self.title}: " + (f"{self.total} problems{resumed}" if self.total else "loading"),
                  file=self._stream, flush=True)  # fmt: skip
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._note()
        if self._live is None:
            self._print()
        else:
            self._live.stop()

    def _print(self) -> None:
        self._printed = time.monotonic()
        print(line(self.state()), file=self._stream, flush=True)

    def _note(self) -> None:
        self._noted = time.monotonic()
        if _kept is None:
            return
        path, about = _kept
        temporary = path.with_name(path.name + ".tmp")
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps({**about, **self.state(), "updated": time.time()}), encoding="utf-8")
        os.replace(temporary, path)  # not synced: it is worth nothing after a power failure

    def _drawn(self) -> RenderableType:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        state = self.state()
        head = Table.grid(padding=(0, 2))
        bar = ProgressBar(total=max(1, self.total), completed=self.done, width=30)
        head.add_row(Text(self.title, style="bold"), bar, Text(_count(state)), Text(_time(state), style="dim"))
        return Group(head, *(Text("  " + "  ".join(texts)) for texts in words(self.figures)))


class SearchProgress(Progress):
    """Called with each finished problem. Its figures are those of the problems finished since this start, its rates
    those since a worker was ready: loading a model counts for neither."""

    def __init__(self, title: str, *, total: int, already: int, stream: TextIO | None = None) -> None:
        super().__init__(title, total=total, already=already, stream=stream)
        self.sums: Counter[str] = Counter()
        self.outcomes: Counter[str] = Counter()
        self.levels: dict[str, list[int]] = {"all": [0, 0]}
        self.busy: dict[str, float] = {}  # by worker, the latest

    def __call__(self, summary: ProblemSummary) -> None:
        self._mark = min(self._mark or (inf, self.already), (time.monotonic() - summary.up, self.already))
        self.sums.update(rollouts=summary.rollouts, tokens=summary.tokens)
        self.outcomes.update(summary.outcomes)
        self.busy[summary.worker] = summary.busy
        for level in {summary.level or "all", "all"}:
            solved = self.levels.setdefault(level, [0, 0])
            solved[0] += summary.solved
            solved[1] += 1
        self.update(
            self.done + 1,
            **{"answered" if summary.test_time else "solved": dict(sorted(self.levels.items()))},
            **self.sums,
            tokens_per_second=round(self.sums["tokens"] / max(time.monotonic() - self._mark[0], 1e-9), 1),
            engine_busy=round(sum(self.busy.values()) / len(self.busy), 3),
            outcomes=dict(self.outcomes.most_common()),
        )


class TrainingProgress(Progress):
    """Called with each optimizer step."""

    def __call__(self, progress: TrainProgress) -> None:
        if not self.total:  # neither the loading nor the steps of an earlier start say how fast it is
            self._mark = (time.monotonic(), progress.step)
        self.total = progress.steps
        rate = round(progress.tokens / max(progress.seconds, 1e-9), 1)
        self.update(progress.step, loss=progress.loss, tokens_per_second=rate)


# -- what a state says -------------------------------------------------------------------------------------------------


def line(state: Mapping[str, Any]) -> str:
    """A state as one line of text."""
    texts = [text for group in words(state["figures"]) for text in group]
    return f"{state['title']}: " + "  ".join(text for text in (_count(state), *texts, _time(state)) if text)


def words(figures: Mapping[str, Any]) -> Iterator[list[str]]:
    """The figures as short texts, those that belong together in a list."""
    for word in ("solved", "answered"):
        if shares := figures.get(word):
            levels = ", ".join(f"{level} {_share(shares[level])}" for level in shares if level != "all")
            yield [f"{word} {_share(shares['all'])}" + (f" (level {levels})" if levels else "")]
    forms = {
        "right": "right {:.0%}", "rollouts": "{:,} rollouts", "loss": "loss {:.3f}", "steps": "{:,} optimizer steps",
        "tokens_per_second": "{:,.0f} tok/s", "engine_busy": "engine {:.0%} busy",
    }  # fmt: skip
    if texts := [form.format(figures[name]) for name, form in forms.items() if name in figures]:
        yield texts
    if outcomes := figures.get("outcomes"):
        total = sum(outcomes.values())
        yield [f"{total:,} steps: " + ", ".join(f"{count / total:.0%} {name}" for name, count in outcomes.items())]


def duration(seconds: float) -> str:
    """45 s, 12 min, 3.2 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _share(part: tuple[int, int]) -> str:
    return f"{part[0] / max(1, part[1]):.0%}"


def _count(state: Mapping[str, Any]) -> str:
    return f"{state['done']}/{state['total']}" if state["total"] else "loading"


def _time(state: Mapping[str, Any]) -> str:
    eta = state["eta_seconds"]
    return f"{duration(state['seconds'])} so far" + (f", {duration(eta)} left" if eta is not None else "")


def say_dropped(title: str, dropped: int, max_length: int) -> None:
    """Print how many rows a training has left out, where it has."""
    if dropped:
        print(f"{title}: {dropped} rows dropped, longer than max_length={max_length} tokens", flush=True)
