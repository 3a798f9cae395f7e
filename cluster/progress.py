"""What a person sees while things start and stop: one line for each step, with its seconds."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text


class Step:
    """One line. `note` may be changed while it runs."""

    def __init__(self, steps: Steps, title: str) -> None:
        self._steps = steps
        self.title = title
        self.note = ""
        self.began = time.monotonic()
        self.seconds: float | None = None
        self.failed = False
        self.spinner = Spinner("dots")

    def done(self, note: str | None = None) -> None:
        """Idempotent."""
        if self.seconds is None:
            self.note = self.note if note is None else note
            self.seconds = time.monotonic() - self.began
            self._steps.finished(self)

    def __enter__(self) -> Step:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.failed = error is not None
        self.done()


class Steps:
    """Spinners on a terminal; elsewhere one plain line when a step has ended."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._running: list[Step] = []
        self._live: Live | None = None
        self.seconds: dict[str, float] = {}

    def __enter__(self) -> Steps:
        if self._console.is_terminal:
            self._live = Live(
                console=self._console,
                get_renderable=self._render,
                refresh_per_second=8,
                transient=True,
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for step in list(self._running):
            step.failed = True
            step.done()
        if self._live is not None:
            self._live.stop()
            self._live = None

    def begin(self, title: str) -> Step:
        step = Step(self, title)
        self._running.append(step)
        return step

    def finished(self, step: Step) -> None:
        self._running.remove(step)
        assert step.seconds is not None
        self.seconds[step.title] = step.seconds
        sign = Text("✗ ", "red") if step.failed else Text("✓ ", "green")
        self._console.print(Text.assemble(sign, self._line(step, step.seconds)), soft_wrap=True)

    def _render(self) -> Table:
        table = Table.grid(padding=(0, 1))
        for step in self._running:
            table.add_row(step.spinner, self._line(step, time.monotonic() - step.began))
        return table

    @staticmethod
    def _line(step: Step, seconds: float) -> Text:
        note = f" · {step.note}" if step.note else ""
        return Text.assemble(f"{step.title:<10}", (f"{seconds:5.1f} s", "dim"), (note, "dim"))
