"""Write each room's `__init__.pyi` from what its files define; with --check only say which are out of date."""

import sys
from pathlib import Path

import gradwise
from gradwise.core.rooms import existing_rooms, public_names


def stub(room: str) -> str:
    lines = sorted(f"from {value.__module__} import {name} as {name}" for name, value in public_names(f"gradwise.{room}").items())
    return "\n".join(["# Written by `make stubs`; do not edit.", *lines, ""])


def main(check: bool) -> int:
    late = 0
    for room in existing_rooms():
        path, text = Path(gradwise.__file__).parent / room / "__init__.pyi", stub(room)
        if path.exists() and path.read_text() == text:
            continue
        if check:
            print(f"{path} is out of date: run `make stubs`")
            late = 1
        else:
            path.write_text(text)
    return late


if __name__ == "__main__":
    sys.exit(main(check="--check" in sys.argv[1:]))
