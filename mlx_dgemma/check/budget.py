"""How much time is left. Sections ask before every piece of work, so that a slow machine gets a shorter report."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

Clock = Callable[[], float]


class Budget:
    """Seconds from now on, by a clock that tests may replace."""

    def __init__(self, seconds: float, clock: Clock = time.perf_counter):
        self.clock, self._end = clock, clock() + seconds

    @property
    def left(self) -> float:
        """Seconds; negative once it is over."""
        return self._end - self.clock()

    def has(self, seconds: float = 0.0) -> bool:
        """Whether there is time for a piece of work that takes about `seconds`."""
        return self.left > seconds

    def part(self, share: float) -> Budget:
        """A share (0-1) of what is left."""
        return Budget(share * max(0.0, self.left), self.clock)


class OutOfTime(Exception):
    """Raised instead of one more pass."""


class Limited:
    """A model that raises OutOfTime once a budget is over: for what cannot be asked to stop."""

    def __init__(self, model: Any, budget: Budget):
        self._model, self._budget = model, budget

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def encode(self, *args: Any, **options: Any) -> Any:
        if not self._budget.has():
            raise OutOfTime
        return self._model.encode(*args, **options)
