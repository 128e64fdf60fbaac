"""Where trials run: spawned processes here, or Ray on many machines. A trial is a pure function, so the numbers do not care.

An engine takes jobs, keyword arguments of `run_trial`, and gives back what it finished, one at a time, in the order of
finishing. A process that dies under a trial, as the kernel's out-of-memory killer makes it, is replaced and the trial tried once
more; dying again is a result.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import itertools
import logging
import multiprocessing
import os
import signal
import threading
import traceback
from collections import deque
from collections.abc import Iterator
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Protocol

from gradwise.bench.trial import died, run_trial
from gradwise.core.errors import UserError, unknown

ENGINES = ("local", "ray", "inline")
_ENDED_ON_PURPOSE = (-signal.SIGTERM, -signal.SIGINT)
"""Exit codes of a process that somebody, or a machine that shuts down, asked to end: no result of the trial's."""

Job = dict[str, Any]
Key = Any  # whatever the caller knows a job by: hashable


class TrialFailed(UserError):
    """A trial raised what is no divergence: a mistake in a task or in a method. The message ends with the traceback.

    Example:
        >>> raise TrialFailed("KeyError: 'x'")
        Traceback (most recent call last):
        gradwise.bench.engines.TrialFailed: KeyError: 'x'
    """


class Engine(Protocol):
    """Runs jobs; see the module.

    Example:
        >>> engine: Engine = InlineEngine()
        >>> engine.close()
    """

    def submit(self, key: Key, job: Job) -> None:
        """Take a job; it starts as soon as there is room."""

    def finished(self) -> tuple[Key, dict[str, Any]]:
        """Wait for the next job to finish: its key and its trial."""

    def close(self) -> None:
        """Stop everything at once."""


def check(name: str) -> None:
    """See that an engine can be had.

    Raises:
        UserError: no such engine, or Ray is not installed.

    Example:
        >>> check("locl")
        Traceback (most recent call last):
        gradwise.core.errors.UserError: unknown engine 'locl'; did you mean 'local'? (known: inline, local, ray)
    """
    if name not in ENGINES:
        raise unknown("engine", name, ENGINES)
    if name == "ray" and importlib.util.find_spec("ray") is None:
        raise UserError("--engine ray needs Ray: pip install 'gradwise[ray]'")


def make(name: str, workers: int) -> Engine:
    """An engine by name.

    Args:
        name: "local" (spawned processes), "ray" (needs the extra), "inline" (this process, one at a time).
        workers: how many jobs run at a time; for Ray on a cluster, what the cluster has.

    Raises:
        UserError: as `check`.

    Example:
        >>> make("inline", 1).close()
    """
    check(name)
    if name == "ray":
        return RayEngine(workers)
    return LocalEngine(workers) if name == "local" else InlineEngine()


class InlineEngine:
    """One job at a time in this very process.

    Example:
        >>> from gradwise.bench.recipe import Budget
        >>> from gradwise.bench.sentence import Sentence, Word
        >>> engine = InlineEngine()
        >>> job = {"task": "wine", "sentence": Sentence(Word("sgd")), "hyper": {"lr": 0.1}, "seed": 0}
        >>> engine.submit("first", job | {"budget": Budget(kind="steps", amount=2)})
        >>> key, trial = engine.finished()
        >>> key, trial["cost"]["steps"]
        ('first', 2)
    """

    def __init__(self) -> None:
        self._waiting: deque[tuple[Key, Job]] = deque()

    def submit(self, key: Key, job: Job) -> None:
        self._waiting.append((key, job))

    def finished(self) -> tuple[Key, dict[str, Any]]:
        key, job = self._waiting.popleft()
        return key, _unwrapped(_attempted(job), key)

    def close(self) -> None:
        self._waiting.clear()


@dataclasses.dataclass
class _Worker:
    process: BaseProcess
    connection: Connection
    doing: tuple[Key, Job] | None = None


class LocalEngine:
    """Spawned processes, each with one thread; they end when this process does, however it ends.

    Args:
        workers: number of processes.

    Example:
        >>> engine = LocalEngine(2)
        >>> engine.close()
    """

    def __init__(self, workers: int) -> None:
        self._context = multiprocessing.get_context("spawn")
        self._waiting: deque[tuple[Key, Job]] = deque()
        self._deaths: dict[Key, int] = {}
        self._names = itertools.count()
        self._workers = [self._spawned() for _ in range(workers)]

    def submit(self, key: Key, job: Job) -> None:
        self._waiting.append((key, job))
        self._dispatch()

    def finished(self) -> tuple[Key, dict[str, Any]]:
        while True:
            busy = {worker.connection: worker for worker in self._workers if worker.doing is not None}
            for connection in wait(list(busy)):
                worker = busy[connection]  # type: ignore[index]
                assert worker.doing is not None
                key, job = worker.doing
                try:
                    answer = worker.connection.recv()
                except (EOFError, OSError):
                    trial = self._buried(worker, key, job)
                    if trial is not None:
                        return key, trial
                    continue
                worker.doing = None
                self._dispatch()
                return key, _unwrapped(answer, key)

    def close(self) -> None:
        self._waiting.clear()
        for worker in self._workers:
            worker.process.kill()
        for worker in self._workers:
            worker.process.join()
            worker.connection.close()
        self._workers = []

    def _dispatch(self) -> None:
        for worker in self._workers:
            if worker.doing is None and self._waiting:
                worker.doing = self._waiting.popleft()
                # a worker that is dead already is met again in finished()
                with contextlib.suppress(OSError):
                    worker.connection.send(worker.doing[1])

    def _spawned(self) -> _Worker:
        here, there = self._context.Pipe()
        process = self._context.Process(target=_serve, args=(there,), name=f"gradwise-worker-{next(self._names)}", daemon=True)
        with _interrupts_ignored():
            process.start()
        there.close()
        return _Worker(process, here)

    def _buried(self, worker: _Worker, key: Key, job: Job) -> dict[str, Any] | None:
        """Replace a worker that died; its job goes to the front of the queue, or, the second time, becomes a result."""
        worker.process.join()
        worker.connection.close()
        code = worker.process.exitcode
        if code in _ENDED_ON_PURPOSE:
            name = signal.Signals(-code).name
            raise UserError(f"a worker was ended by {name}: what was measured is kept, the same command continues")
        self._workers[self._workers.index(worker)] = self._spawned()
        self._deaths[key] = self._deaths.get(key, 0) + 1
        if self._deaths[key] == 1:
            self._waiting.appendleft((key, job))
        self._dispatch()
        if self._deaths[key] == 1:
            return None
        return died(
            job, f"the process running it died twice (exit code {code}{', most often out of memory' if code == -9 else ''})"
        )


@dataclasses.dataclass
class RayEngine:
    """Jobs as Ray tasks of one CPU each: on the cluster that RAY_ADDRESS names, else on this machine.

    Every machine needs gradwise in the same version and, for a user's own task, its file under the same path.

    Args:
        workers: CPUs that Ray may use when it is started here.

    Example:
        >>> [f.name for f in dataclasses.fields(RayEngine) if f.init]
        ['workers']
    """

    workers: int
    _running: dict[Any, Key] = dataclasses.field(default_factory=dict, init=False)
    _jobs: dict[Key, Job] = dataclasses.field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        import ray

        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray's coming default, said so that it need not warn
        self._started = not ray.is_initialized()
        if self._started:
            local: dict[str, Any] = {} if os.environ.get("RAY_ADDRESS") else {"num_cpus": self.workers, "include_dashboard": False}
            path = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]))
            ray.init(log_to_driver=False, logging_level=logging.ERROR, runtime_env={"env_vars": {"PYTHONPATH": path}}, **local)
        self._ray = ray
        self._remote = ray.remote(num_cpus=1, max_retries=1)(_attempted)

    def submit(self, key: Key, job: Job) -> None:
        self._jobs[key] = job
        self._running[self._remote.remote(job)] = key

    def finished(self) -> tuple[Key, dict[str, Any]]:
        (done,), _ = self._ray.wait(list(self._running), num_returns=1)
        key = self._running.pop(done)
        job = self._jobs.pop(key)
        try:
            return key, _unwrapped(self._ray.get(done), key)
        except (self._ray.exceptions.WorkerCrashedError, self._ray.exceptions.OutOfMemoryError) as error:
            return key, died(job, f"the Ray worker running it died: {str(error).strip().splitlines()[0]}")

    def close(self) -> None:
        for reference in self._running:
            self._ray.cancel(reference, force=True)
        self._running.clear()
        if self._started:
            self._ray.shutdown()


def _attempted(job: Job) -> tuple[str, Any]:
    """A trial, or what went wrong as text: exceptions themselves do not always travel between processes."""
    try:
        return "trial", run_trial(**job)
    except UserError as error:
        return "mistake", str(error)
    except (Exception, SystemExit) as error:
        return "failure", f"{type(error).__name__}: {error}\n{traceback.format_exc()}"


def _unwrapped(answer: tuple[str, Any], key: Key) -> dict[str, Any]:
    kind, value = answer
    which = " ".join(map(str, key)) if isinstance(key, tuple) else str(key)
    if kind == "mistake":
        raise UserError(f"{which}: {value}")
    if kind == "failure":
        raise TrialFailed(f"{which}: {value}")
    return value


def _serve(connection: Connection) -> None:
    """What a spawned process does: answer jobs until nobody asks any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asked
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_die_with, args=(parent.sentinel,), daemon=True).start()
    while True:
        try:
            job = connection.recv()
        except (EOFError, OSError):
            return
        connection.send(_attempted(job))


def _die_with(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)


@contextlib.contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """A process started inside ignores Ctrl-C from its first instruction on."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
