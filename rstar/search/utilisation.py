"""Engine utilisation: the share of time in which an engine has work. Low: more problems in flight would help."""

from __future__ import annotations

import time
from collections.abc import Sequence

from rstar.engines.base import Policy, Scorer
from rstar.types import Generation, PromptText, SamplingParams


class Utilisation:
    """Counts the time in which at least one call is inside `with busy:`."""

    def __init__(self) -> None:
        self._begun = self._since = time.monotonic()
        self._busy = 0.0
        self._calls = 0

    def __enter__(self) -> None:
        if not self._calls:
            self._since = time.monotonic()
        self._calls += 1

    def __exit__(self, *_: object) -> None:
        self._calls -= 1
        if not self._calls:
            self._busy += time.monotonic() - self._since

    @property
    def seconds(self) -> float:
        """Since this was made."""
        return time.monotonic() - self._begun

    @property
    def share(self) -> float:
        """Of those seconds, in [0, 1]."""
        inside = time.monotonic() - self._since if self._calls else 0.0
        return (self._busy + inside) / max(self.seconds, 1e-9)


class WatchedPolicy:
    """A policy whose calls count as busy time."""

    def __init__(self, policy: Policy, busy: Utilisation) -> None:
        self._policy, self._busy = policy, busy

    async def generate(self, prompt: PromptText, params: SamplingParams) -> list[Generation]:
        with self._busy:
            return await self._policy.generate(prompt, params)

    async def close(self) -> None:
        await self._policy.close()


class WatchedScorer:
    """A scorer whose calls count as busy time."""

    def __init__(self, scorer: Scorer, busy: Utilisation) -> None:
        self._scorer, self._busy = scorer, busy

    async def score(self, prompt: PromptText, completions: Sequence[Sequence[str]]) -> list[float]:
        with self._busy:
            return await self._scorer.score(prompt, completions)

    async def close(self) -> None:
        await self._scorer.close()
