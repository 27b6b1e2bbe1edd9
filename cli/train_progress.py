"""Shows training while it runs: bars on a terminal, JSON lines off it or when asked. Decides nothing."""

import json
from typing import Any, Self

import click

from loractl.cli.marking import marked
from loractl.cli.output import is_interactive, print_note

_PREVIEW_CHARS = 300


class ProgressPrinter:
    """A listener for one run or a fleet: a bar for each adapter on a terminal, else JSON lines on stderr."""

    def __init__(self, *, as_json: bool) -> None:
        self._as_lines = as_json or not is_interactive()
        self._bars: Any = None
        self._tasks: dict[str, Any] = {}
        self._evals: dict[str, float] = {}

    def __enter__(self) -> Self:
        if not self._as_lines:
            print_note("loading the base ...")
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars is not None:
            self._bars.stop()

    def __call__(self, run: str, event: Any) -> None:
        from dataclasses import asdict

        if self._as_lines:
            fields = asdict(event)
            fields.pop("preview", None)  # rows are for people, not for logs
            for name in ("reward_margin", "reward_accuracy"):  # of pairs alone
                if name in fields and fields[name] is None:
                    del fields[name]
            click.echo(json.dumps({"event": type(event).__name__.lower(), "run": run} | fields), err=True)
        else:
            getattr(self, f"_show_{type(event).__name__.lower()}")(run, event)

    def _note(self, text: str) -> None:
        if self._bars is not None:
            self._bars.console.print(text, highlight=False, markup=False)
        else:
            print_note(text)

    def _show_started(self, run: str, event: Any) -> None:
        together = f"; {event.num_processes} processes" if event.num_processes > 1 else ""
        self._note(f"{run}: {event.data.sentence()}")
        print_note(f"{run}: row 1, learned in bold: {marked(event.preview, max_chars=_PREVIEW_CHARS)}")
        self._note(f"{run}: {event.num_parameters:,} parameters; {event.num_steps} steps{together}")
        if self._bars is None:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            self._bars = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=20),
                TextColumn("{task.completed}/{task.total}  loss {task.fields[loss]}  eval {task.fields[held_out]}"),
                TextColumn("{task.fields[rate]} tok/s"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._bars.start()
        self._tasks[run] = self._bars.add_task(run, total=event.num_steps, loss="-", held_out="-", rate="-")

    def _show_stepped(self, run: str, event: Any) -> None:
        self._bars.update(
            self._tasks[run],
            completed=event.step,
            loss=f"{event.loss:.3f}{_pair_figures(event)}",
            rate=f"{event.tokens_per_s:.0f}",
        )

    def _show_evaluated(self, run: str, event: Any) -> None:
        before = self._evals.get(run)
        self._evals[run] = event.loss
        arrow = "" if before is None else ("↓" if event.loss < before else "↑")
        self._bars.update(self._tasks[run], held_out=f"{event.loss:.4f}{arrow}{_pair_figures(event)}")

    def _show_saved(self, run: str, event: Any) -> None:
        self._note(f"{run}: checkpoint at step {event.step}")

    def _show_resumed(self, run: str, event: Any) -> None:
        self._note(f"{run}: goes on after step {event.step}")
        self._bars.update(self._tasks[run], completed=event.step)

    def _show_shrunk(self, run: str, event: Any) -> None:
        self._note(
            f"{run}: memory ran out at step {event.step}: {event.num_rows} rows at a time from now on, "
            f"still {event.rows_per_step} rows a step"
        )

    def _show_stopped(self, run: str, event: Any) -> None:
        self._note(f"{run}: {'failed' if event.failed else 'stopped'} at step {event.step}: {event.reason}")


def _pair_figures(event: Any) -> str:
    if event.reward_accuracy is None:
        return ""
    return f" (prefers right {event.reward_accuracy:.0%}, margin {event.reward_margin:+.2f})"
