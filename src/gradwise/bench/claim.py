"""A paper's claim as one small class, and the verdict on it, which the framework passes and never the claim's author.

A claim states what the paper says, what figure it published, what is measured here and in which direction; its `measure(seed)`
returns the method's and the baseline's figure for one seed. `run_claim` measures every seed and lets a paired bootstrap over
the seeds decide. A claim that does not reproduce stays, and says so.
"""

from __future__ import annotations

import hashlib
import inspect
import math
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar

import torch

import gradwise
from gradwise.bench.one_thread import one_thread
from gradwise.bench.statistics import PairedDifference, paired_bootstrap

VERDICTS = ("reproduced", "no detectable difference", "contradicted", "not measurable at this scale")
_EXPECTS = ("difference", "parity", "not worse")
_WORDS = ("statement", "published", "metric", "needs")
_LEVEL = 0.95


class Claim:
    """One claim of one paper, made runnable. Subclass it in `claims/ROOM/ID.py`; attributes are checked on definition.

    Attributes:
        paper: the paper's id, which is also the file's name.
        statement: what the paper says, in one sentence that a measurement could refute.
        published: the paper's own figure, or "no single figure" with what there is instead.
        metric: what is measured, with its unit where it has one.
        better: "higher" or "lower": the direction in which the method should differ from the baseline.
        seeds: at least two distinct integers; five and more see something.
        needs: data and time, such as "digits: 20 s on 2 cores".
        expects: "difference" (the method is better), "parity" (they are about equal) or "not worse".
        tolerance: for parity and "not worse", the margin in units of the metric, stated before anything is measured; else 0.
        not_measurable: why nobody can measure it at this scale; then there is no `measure`, and that is the verdict.
        source: set by the framework: `source_hash` of the text that was imported.

    A class that only shares fields and code with its subclasses says so: `class Shared(Claim, abstract=True)`.

    Raises:
        TypeError: when a subclass is defined without one of these, or with one that makes no sense; the message names it.

    Example:
        >>> class Halving(Claim):
        ...     paper, statement, published = "example", "Half of a number is less than the number.", "exactly half"
        ...     metric, better, needs = "value", "lower", "nothing"
        ...     def measure(self, seed: int) -> dict[str, float]:
        ...         return {"method": 0.5 * (seed + 1), "baseline": seed + 1.0}
        >>> run_claim(Halving()).verdict
        'reproduced'
    """

    paper: ClassVar[str]
    statement: ClassVar[str]
    published: ClassVar[str]
    metric: ClassVar[str]
    better: ClassVar[str]
    needs: ClassVar[str]
    seeds: ClassVar[Sequence[int]] = range(5)
    expects: ClassVar[str] = "difference"
    tolerance: ClassVar[float] = 0.0
    not_measurable: ClassVar[str] = ""
    source: ClassVar[str] = ""

    def __init_subclass__(cls, abstract: bool = False, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.source = source_hash(cls)  # now, not after measuring: the file may be edited meanwhile
        if not abstract:
            _check_definition(cls)

    def measure(self, seed: int) -> dict[str, float]:
        """The figures of one seed: {"method": ..., "baseline": ...}, both finite and from the same data order and initialisation.

        Example:
            >>> Claim().measure(0)
            Traceback (most recent call last):
            NotImplementedError: Claim has no measure(seed)
        """
        raise NotImplementedError(f"{type(self).__name__} has no measure(seed)")

    @classmethod
    def label(cls) -> str:
        """The claim's name among all claims: paper id, dot, class name.

        Example:
            >>> from gradwise.claims.optim.lion import HalfTheState
            >>> HalfTheState.label()
            'lion.HalfTheState'
        """
        return f"{cls.paper}.{cls.__name__}"


@dataclass(frozen=True)
class Measurement:
    """What one seed gave.

    Example:
        >>> Measurement(seed=0, method=0.97, baseline=0.95, seconds=1.5).method
        0.97
    """

    seed: int
    method: float
    baseline: float
    seconds: float


@dataclass(frozen=True)
class Verdict:
    """A verdict with all it rests on: the claim's words, the raw numbers of every seed, and where and when they were measured.

    Attributes:
        claim: class name; with `paper` it identifies the claim.
        verdict: one of `VERDICTS`.
        reason: the rule that gave the verdict, in words.
        difference, low, high, p: of method - baseline over the seeds, with its 95 % interval; None when nothing was measured.
        measurements: the raw numbers.
        environment: versions, threads and hardware.
        created: UTC time, ISO 8601.
        source: of the claim, by which a verdict on another text is recognised as stale.

    Example:
        >>> from gradwise.claims.optim.lion import HalfTheState
        >>> verdict = run_claim(HalfTheState(), seeds=(0, 1))
        >>> Verdict.from_json(verdict.to_json()) == verdict
        True
    """

    paper: str
    claim: str
    statement: str
    published: str
    metric: str
    better: str
    expects: str
    tolerance: float
    needs: str
    verdict: str
    reason: str
    difference: float | None
    low: float | None
    high: float | None
    p: float | None
    measurements: tuple[Measurement, ...]
    environment: dict[str, Any]
    created: str
    source: str

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds measured."""
        return tuple(m.seed for m in self.measurements)

    @property
    def method_mean(self) -> float | None:
        """Mean of the method's figures over the seeds; None when nothing was measured."""
        return math.fsum(m.method for m in self.measurements) / len(self.measurements) if self.measurements else None

    @property
    def baseline_mean(self) -> float | None:
        """Mean of the baseline's figures over the seeds; None when nothing was measured."""
        return math.fsum(m.baseline for m in self.measurements) / len(self.measurements) if self.measurements else None

    def to_json(self) -> dict[str, Any]:
        """The record as plain JSON values; every number is finite."""
        return {**asdict(self), "measurements": [asdict(m) for m in self.measurements]}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Verdict:
        """The inverse of `to_json`.

        Raises:
            ValueError: a field is missing or unknown; it is named.
        """
        try:
            return cls(**{**record, "measurements": tuple(Measurement(**m) for m in record["measurements"])})
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a verdict: {error}") from error


@one_thread()
def run_claim(
    claim: Claim,
    seeds: Sequence[int] | None = None,
    progress: Callable[[Measurement], None] | None = None,
    *,
    kept: Sequence[Measurement] = (),
) -> Verdict:
    """Measure a claim on every seed, on one thread, and pass the verdict.

    Args:
        claim: an instance.
        seeds: instead of the claim's own.
        progress: called after each newly measured seed with what it gave.
        kept: measurements of an interrupted run; their seeds are not measured again.

    Raises:
        ValueError: `measure` returned other keys than method and baseline or a number that is not finite (claim, seed and key are
            named), or fewer than two seeds.

    Example:
        >>> from gradwise.claims.optim.lion import HalfTheState
        >>> run_claim(HalfTheState(), seeds=(0, 1)).difference
        -4.0
    """
    wanted = list(claim.seeds if seeds is None else seeds)
    if claim.not_measurable:
        return _verdict(claim, (), None)
    if len(set(wanted)) < max(2, len(wanted)):
        raise ValueError(f"claim {claim.label()} needs at least 2 distinct seeds, got {wanted}")
    known = {m.seed: m for m in kept}
    measurements = []
    for seed in wanted:
        if seed not in known:
            start = time.perf_counter()
            method, baseline = _figures(claim, seed, claim.measure(seed))
            known[seed] = Measurement(seed, method, baseline, time.perf_counter() - start)
            if progress is not None:
                progress(known[seed])
        measurements.append(known[seed])
    difference = paired_bootstrap([m.method for m in measurements], [m.baseline for m in measurements], level=_LEVEL)
    return _verdict(claim, tuple(measurements), difference)


def pass_verdict(low: float, high: float, *, better: str, expects: str = "difference", tolerance: float = 0.0) -> str:
    """The verdict on an interval [low, high] of method - baseline.

    - "difference": reproduced when the interval lies wholly on the better side of 0, contradicted when wholly on the other;
    - "parity": reproduced when it lies wholly within +-tolerance, contradicted when wholly outside;
    - "not worse": reproduced when it lies wholly above -tolerance (in the better direction), contradicted when wholly below.

    Everything else is "no detectable difference": these seeds cannot tell.

    Raises:
        ValueError: an unknown direction or expectation.

    Example:
        >>> pass_verdict(0.01, 0.03, better="higher"), pass_verdict(0.01, 0.03, better="lower")
        ('reproduced', 'contradicted')
        >>> pass_verdict(-0.01, 0.03, better="lower")
        'no detectable difference'
        >>> pass_verdict(-0.004, 0.006, better="higher", expects="parity", tolerance=0.01)
        'reproduced'
    """
    if better not in ("higher", "lower"):
        raise ValueError(f'better must be "higher" or "lower", got {better!r}')
    worst, best = (low, high) if better == "higher" else (-high, -low)
    if expects == "difference":
        reproduced, contradicted = worst > 0, best < 0
    elif expects == "parity":
        reproduced, contradicted = worst >= -tolerance and best <= tolerance, worst > tolerance or best < -tolerance
    elif expects == "not worse":
        reproduced, contradicted = worst >= -tolerance, best < -tolerance
    else:
        raise ValueError(f"expects must be one of {_EXPECTS}, got {expects!r}")
    return "reproduced" if reproduced else "contradicted" if contradicted else "no detectable difference"


def source_hash(claim: type[Claim]) -> str:
    """`text_hash` of the file that defines the claim ("" when there is no file, as at a prompt).

    Example:
        >>> from gradwise.claims.optim.lion import HalfTheState
        >>> len(source_hash(HalfTheState))
        64
    """
    try:
        file = inspect.getsourcefile(claim)
    except TypeError:
        file = None
    return text_hash(Path(file)) if file and Path(file).is_file() else ""


def text_hash(path: Path) -> str:
    """SHA-256 of a claim file and of the private files (`_name.py`) beside it, whose code its numbers rest on as well.

    Example:
        >>> len(text_hash(Path(__file__)))
        64
    """
    digest = hashlib.sha256(path.read_bytes())
    for shared in sorted(path.parent.glob("_[!_]*.py")):
        digest.update(shared.read_bytes())
    return digest.hexdigest()


def environment() -> dict[str, Any]:
    """Versions, threads and hardware that a number was measured with.

    Example:
        >>> environment()["gradwise"] == gradwise.__version__
        True
    """
    return {
        "gradwise": gradwise.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _processor() -> str:
    """The processor's name; Linux tells it only here."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def _verdict(claim: Claim, measurements: tuple[Measurement, ...], d: PairedDifference | None) -> Verdict:
    verdict, reason = VERDICTS[3], claim.not_measurable
    if d is not None:
        verdict = pass_verdict(d.low, d.high, better=claim.better, expects=claim.expects, tolerance=claim.tolerance)
        rule = {
            "difference": f"the claim needs the 95 % interval wholly {'above' if claim.better == 'higher' else 'below'} 0",
            "parity": f"the claim needs the 95 % interval wholly within +-{claim.tolerance:g}",
            "not worse": "the claim needs the 95 % interval wholly "
            + (f"above -{claim.tolerance:g}" if claim.better == "higher" else f"below {claim.tolerance:g}"),
        }[claim.expects]
        reason = f"{rule}; it is [{d.low:.4g}, {d.high:.4g}] over {len(measurements)} seeds"
    words: dict[str, Any] = {name: getattr(claim, name) for name in ("paper", *_WORDS, "better", "expects")}
    return Verdict(
        **words,
        claim=type(claim).__name__,
        tolerance=float(claim.tolerance),
        verdict=verdict,
        reason=reason,
        difference=d.difference if d else None,
        low=d.low if d else None,
        high=d.high if d else None,
        p=d.p if d else None,
        measurements=measurements,
        environment=environment(),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        source=claim.source,
    )


def _figures(claim: Claim, seed: int, result: Any) -> tuple[float, float]:
    """The two numbers of a measurement, or an error that says what was wrong with it."""
    where = f"claim {claim.label()}, seed {seed}: measure"
    if not isinstance(result, Mapping) or set(result) != {"method", "baseline"}:
        got = f"keys {sorted(map(str, result))}" if isinstance(result, Mapping) else type(result).__name__
        raise ValueError(f'{where} must return a dict with exactly the keys "method" and "baseline", got {got}')
    for key in ("method", "baseline"):
        try:
            finite = math.isfinite(result[key])
        except (TypeError, ValueError):
            finite = False
        if not finite:
            raise ValueError(f"{where} must return finite numbers, got {key} = {result[key]!r}")
    return float(result["method"]), float(result["baseline"])


def _check_definition(cls: type[Claim]) -> None:
    def refuse(name: str, expected: str) -> None:
        given = repr(getattr(cls, name)) if hasattr(cls, name) else "nothing"
        raise TypeError(f"claim {cls.__name__}: attribute {name!r} must be {expected}, got {given}")

    for name in ("paper", *_WORDS):
        value = getattr(cls, name, None)
        if not isinstance(value, str) or not value.strip():
            refuse(name, "a non-empty str")
    if getattr(cls, "better", None) not in ("higher", "lower"):
        refuse("better", '"higher" or "lower"')
    if not isinstance(cls.not_measurable, str):
        refuse("not_measurable", "a str, the reason")
    if cls.expects not in _EXPECTS:
        refuse("expects", f"one of {_EXPECTS}")
    if isinstance(cls.tolerance, bool) or not isinstance(cls.tolerance, int | float) or not 0 <= cls.tolerance < math.inf:
        refuse("tolerance", "a finite number >= 0")
    if cls.expects == "difference" and cls.tolerance:
        refuse("tolerance", '0 where expects = "difference"')
    if cls.expects == "parity" and not cls.tolerance:
        refuse("tolerance", 'above 0 where expects = "parity"')
    measured = cls.measure is not Claim.measure
    if measured == bool(cls.not_measurable):
        words = ("has both", "and") if measured else ("needs either", "or")
        raise TypeError(f"claim {cls.__name__} {words[0]} measure(seed) {words[1]} the reason in 'not_measurable'")
    if not isinstance(cls.seeds, Sequence) or not all(type(s) is int for s in cls.seeds):
        refuse("seeds", "a sequence of int")
    if measured and len(set(cls.seeds)) < max(2, len(cls.seeds)):
        refuse("seeds", "at least 2 distinct int")
