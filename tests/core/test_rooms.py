"""Rooms export what their files define, and nothing else; the stubs that type checkers read say the same."""

import importlib
import inspect
import sys
import textwrap
from pathlib import Path

import pytest

from gradwise.core.rooms import ROOMS, existing_rooms, public_names


@pytest.fixture
def room(tmp_path, monkeypatch):
    """Builds a package of the given files, importable for one test."""

    def build(**files):
        package = tmp_path / "a_room"
        package.mkdir()
        (package / "__init__.py").write_text("")
        for name, text in files.items():
            (package / f"{name}.py").write_text(textwrap.dedent(text))
        monkeypatch.syspath_prepend(tmp_path)
        for loaded in [m for m in sys.modules if m.split(".")[0] == "a_room"]:
            monkeypatch.delitem(sys.modules, loaded)
        return "a_room"

    return build


def test_what_a_file_defines_is_exported_and_what_it_imports_or_hides_is_not(room):
    package = room(
        one="""
            from math import sqrt
            from collections import OrderedDict
            LIMIT = 3
            class Method: pass
            class _Part: pass
            def method(): pass
            def _part(): pass
        """,
        two="from a_room.one import Method\nclass Another(Method): pass",
    )
    assert list(public_names(package)) == ["Another", "Method", "method"]


def test_a_name_defined_twice_is_refused_naming_both_files(room):
    with pytest.raises(ImportError, match=r"both a_room\.one and a_room\.two define Method"):
        public_names(room(one="class Method: pass", two="class Method: pass"))


def test_something_of_another_place_is_shown_where_a_file_asks_for_it(room):
    package = room(one="from collections import OrderedDict, deque\n__all__ = ['deque']\nclass Method: pass")
    assert list(public_names(package)) == ["Method", "deque"]


@pytest.mark.parametrize("name", existing_rooms())
def test_the_rooms_of_this_library_export_their_public_names(name):
    package = importlib.import_module(f"gradwise.{name}")
    exported = {n: v for n, v in vars(package).items() if inspect.isclass(v) or (inspect.isfunction(v) and n != "public_names")}
    assert exported == public_names(f"gradwise.{name}")
    stub = Path(package.__file__).with_suffix(".pyi").read_text().splitlines()[1:]
    told = {}
    for line in stub:
        _, module, _, public, _, again = line.split()
        assert public == again
        told[public] = getattr(importlib.import_module(module), public)
    assert told == exported


def test_existing_rooms_come_in_the_order_of_the_sentence():
    assert {"optim", "estimators", "transforms", "losses"} <= set(existing_rooms())
    assert existing_rooms() == [r for r in ROOMS if r in existing_rooms()]
