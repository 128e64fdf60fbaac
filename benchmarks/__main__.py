"""Run every benchmark, or those named."""

import importlib
import pkgutil
import sys

import benchmarks

if __name__ == "__main__":
    known = [m.name for m in pkgutil.iter_modules(benchmarks.__path__) if m.name not in ("__main__", "timing")]
    wanted = sys.argv[1:] or known
    if unknown := set(wanted) - set(known):
        sys.exit(f"unknown benchmark {', '.join(sorted(unknown))} (known: {', '.join(known)})")
    for name in wanted:
        importlib.import_module(f"benchmarks.{name}").main()
