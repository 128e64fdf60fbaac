"""Every public name of core, the rooms and the top level has a docstring with an example that pytest runs as a doctest."""

import importlib
import inspect
import pkgutil
import sys

import gradwise


def undocumented() -> list[str]:
    missing = []
    for info in pkgutil.walk_packages(gradwise.__path__, "gradwise."):
        if info.name.endswith("__main__") or info.name.startswith("gradwise.claims."):
            continue
        module = importlib.import_module(info.name)
        if not module.__doc__:
            missing.append(info.name)
        for name, value in vars(module).items():
            public = not name.startswith("_") and (inspect.isclass(value) or inspect.isfunction(value))
            if public and value.__module__ == info.name and ">>>" not in (inspect.getdoc(value) or ""):
                missing.append(f"{info.name}.{name}")
    return missing


if __name__ == "__main__":
    names = undocumented()
    print("\n".join(f"{name}: no docstring with an example (>>>)" for name in names))
    sys.exit(bool(names))
