"""The registry of papers: a decorator that notes and changes nothing."""

import importlib
import re

import pytest

from gradwise.core import papers
from gradwise.core.papers import Paper, paper, paper_of, registered
from gradwise.core.rooms import existing_rooms


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch):
    """Papers of these tests must not show up in the catalog."""
    monkeypatch.setattr(papers, "_PAPERS", dict(papers._PAPERS))


def in_room(room, name):
    return type(name, (), {"__module__": f"gradwise.{room}.some_file"})


def test_the_first_name_registers_and_later_ones_join():
    first, second = in_room("optim", "First"), in_room("optim", "Second")
    assert paper("test", title="A Title", arxiv="2501.00001")(first) is first
    assert paper("test")(second) is second
    assert registered()["test"] == Paper("test", "A Title", "2501.00001", "optim", ["gradwise.optim.First", "gradwise.optim.Second"])
    paper("test", title="A Title")(first)  # an import that is repeated
    assert registered()["test"].names == ["gradwise.optim.First", "gradwise.optim.Second"]


def test_functions_and_objects_know_their_paper():
    def method():
        """Some method."""

    method.__module__ = "gradwise.losses.some_file"
    paper("test", title="T")(method)
    cls = paper("test")(in_room("losses", "Method"))
    assert paper_of(method) == paper_of(cls) == paper_of(cls()) == "test"
    assert paper_of(object()) is None
    assert method() is None


def test_contradictions_are_refused_naming_both_sides():
    with pytest.raises(ValueError, match=r"'test' is first named on gradwise.optim.some_file.A: give its title there"):
        paper("test")(in_room("optim", "A"))
    paper("test", title="One")(in_room("optim", "A"))
    with pytest.raises(ValueError, match=r"'One' in room 'optim', but .*B says 'Two' in 'optim'"):
        paper("test", title="Two")(in_room("optim", "B"))
    with pytest.raises(ValueError, match=r"in room 'optim', but .*B says '' in 'losses'"):
        paper("test")(in_room("losses", "B"))


def test_every_registered_paper_can_be_imported_and_cited():
    for room in existing_rooms():
        importlib.import_module(f"gradwise.{room}")
    assert {"adabelief", "lion", "adamp", "gradient_noise", "zo_bench", "comp_sum", "schedule_refinement"} <= registered().keys()
    assert list(registered()) == sorted(registered())
    for entry in registered().values():
        assert entry.title
        assert not entry.arxiv or re.fullmatch(r"\d{4}\.\d{4,5}", entry.arxiv), entry
        for path in entry.names:
            module, name = path.rsplit(".", 1)
            assert module == f"gradwise.{entry.room}"
            assert paper_of(getattr(importlib.import_module(module), name)) == entry.id
