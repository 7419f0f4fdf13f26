"""Build a base index in a background thread."""

from __future__ import annotations

import threading

from softdb.index.builder import BuildPlan, BuildResult, run_build

__all__ = ["BackgroundBuild"]


class BackgroundBuild:
    """Background thread that builds a base index."""

    def __init__(self, plan: BuildPlan) -> None:
        self._result: BuildResult | None = None
        self._thread = threading.Thread(target=self._run, args=(plan,), name="softdb index build")
        self._thread.start()

    def _run(self, plan: BuildPlan) -> None:
        self._result = run_build(plan)

    @property
    def is_done(self) -> bool:
        """Whether `wait` returns at once."""
        return not self._thread.is_alive()

    def wait(self) -> BuildResult | None:
        """Wait for the result; return None if the thread ended without one."""
        self._thread.join()
        return self._result
