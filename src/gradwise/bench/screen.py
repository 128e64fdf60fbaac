"""What `compare` says while it works: a bar a method, a line for every piece of news, a table at the end."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from gradwise.bench.recipe import Recipe
from gradwise.bench.tasks import Task


class Screen:
    """Progress of one comparison on a console.

    Args:
        console: where to; without a terminal only the lines appear, no bars.
        recipe, task: what is compared on what.

    Example:
        >>> from gradwise.bench import recipe, tasks
        >>> screen = Screen(Console(), recipe.parse({"task": "wine", "methods": ["adamw", "sgd"]}), tasks.load("wine"))
        >>> screen.say("hello")
        hello
    """

    def __init__(self, console: Console, recipe: Recipe, task: Task) -> None:
        self.console, self.recipe, self.task = console, recipe, task
        if not console.is_terminal:
            console.width = max(console.width, 250)  # a file or a pipe has no width to fold a table to
        self.width = max(map(len, recipe.methods))
        self.progress = Progress(
            TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeRemainingColumn(),
            TextColumn("{task.fields[news]}"),
            console=console, transient=True, disable=not console.is_terminal,
        )  # fmt: skip
        total = recipe.trials + len(recipe.seeds)
        self.bars: dict[str, TaskID] = {name: self.progress.add_task(name, total=total, news="") for name in recipe.methods}
        self._first = True

    def __enter__(self) -> Screen:
        self.progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.progress.stop()

    def say(self, line: str) -> None:
        """Print a line above the bars.

        Example:
            >>> from gradwise.bench import recipe, tasks
            >>> Screen(Console(), recipe.parse({"task": "wine", "methods": ["adam", "sgd"]}), tasks.load("wine")).say("[a]")
            [a]
        """
        self.console.print(escape(line), highlight=False, soft_wrap=True)

    def trial(self, method: str, trial: Mapping[str, Any], *, kept: bool, final: bool) -> None:
        """A trial is there: move its bar, and say the very first one, so that nobody stares at an empty screen."""
        text = self._figure(trial["test"] if final else trial["validation"], trial)
        phase = f"seed {trial['seed']}" if final else f"trial {trial['number'] + 1} of {self.recipe.trials}"
        self.progress.update(self.bars[method], advance=1, news=f"{phase}: {text}")
        if self._first and not kept:
            self._first = False
            split = "test" if final else "validation"
            self.say(
                f"{method:{self.width}}  {phase}: {split} {self.task.metric} {text}  ({self.hyper(trial['hyper'])})"
            )

    def tuned(self, method: str, trials: list[dict[str, Any]], chosen: Mapping[str, Any]) -> None:
        """A method's tuning has ended."""
        best = next((t for t in trials if t["hyper"] == chosen), trials[0])
        lost = sum(t["status"] == "diverged" for t in trials)
        figure = self._figure(best["validation"], best)
        note = f", {lost} of {len(trials)} trials diverged" if lost else ""
        self.say(
            f"{method:{self.width}}  tuned: validation {self.task.metric} {figure}  ({self.hyper(chosen)}){note}"
        )

    def table(self, results: Mapping[str, Any]) -> None:
        """The final figures and the verdict."""
        said = {c["method"]: c for c in results["comparisons"]}
        diverged = any(m["summary"]["diverged"] for m in results["methods"])
        title = f"test {self.task.metric}, mean over {len(self.recipe.seeds)} seeds; differences from {self.recipe.baseline}"
        table = Table(title=escape(title), title_justify="left", title_style="", box=None, pad_edge=False, header_style="bold")
        for name in ("method", "mean", "95 % interval", "difference", "verdict", "ms/step", *(["diverged"] if diverged else [])):
            table.add_column(name, justify="left" if name in ("method", "verdict") else "right")
        sign = -1 if self.task.better == "higher" else 1
        for m in sorted(results["methods"], key=lambda m: (m["summary"]["mean"] is None, sign * (m["summary"]["mean"] or 0))):
            s, c = m["summary"], said.get(m["name"])
            row = [
                escape(m["name"]),
                "-" if s["mean"] is None else figure(s["mean"]),
                "-" if s["low"] is None else f"{figure(s['low'], 3)} to {figure(s['high'], 3)}",
                figure(c["difference"], sign="+") if c and s["mean"] is not None else "-",
                self._verdict(m, c, results["baseline"]),
                "-" if s["seconds_per_step"] is None else f"{1000 * s['seconds_per_step']:.3g}",
                f"{s['diverged']} of {len(m['runs'])}" if s["diverged"] else "-",
            ]
            table.add_row(*row[: len(table.columns)])
        self.console.print()
        self.console.print(table)
        self.console.print()
        self.console.print(escape(results["verdict"]), style="bold", highlight=False, soft_wrap=True)

    @staticmethod
    def hyper(hyper: Mapping[str, Any]) -> str:
        """Hyper-parameters in short.

        Example:
            >>> Screen.hyper({"lr": 0.0123456, "nesterov": True})
            'lr=0.0123, nesterov=True'
        """
        return ", ".join(f"{k}={v:.3g}" if isinstance(v, float) else f"{k}={v}" for k, v in hyper.items())

    @staticmethod
    def _verdict(method: Mapping[str, Any], comparison: Mapping[str, Any] | None, baseline: str) -> str:
        if method["runs"] and method["summary"]["mean"] is None:
            return "diverged on every seed"
        return comparison["verdict"] if comparison else "baseline" if method["name"] == baseline else "-"

    def _figure(self, value: float | None, trial: Mapping[str, Any]) -> str:
        return figure(value) if value is not None else f"diverged ({trial['reason']})"


def figure(value: float, places: int = 4, sign: str = "") -> str:
    """A figure of the metric: so many decimals, or so many digits where decimals would say little; never "-0.0000".

    Example:
        >>> figure(0.97), figure(-1e-17), figure(0.000123456), figure(0.0021, sign="+"), figure(123456.7)
        ('0.9700', '0.0000', '0.0001235', '+0.0021', '1.235e+05')
    """
    value = 0.0 if abs(value) < 1e-12 else value
    kind = "f" if value == 0 or 1e-3 <= abs(value) < 1e4 else "g"
    return f"{value:{sign}.{places}{kind}}"
