"""Errors a user can mend: the nearest names are suggested."""

import pytest

from gradwise.core.errors import UserError, unknown

METHODS = ["adamw", "adabelief", "adamp", "lion", "sgd", "sgdp"]


@pytest.mark.parametrize(
    ("given", "suggested"), [("adamm", "adamw"), ("ADABELIEV", "adabelief"), ("loin", "lion"), ("sdg", "sgd"), ("sgd_p", "sgdp")]
)
def test_the_nearest_name_comes_first(given, suggested):
    error = unknown("method", given, METHODS)
    assert isinstance(error, UserError)
    assert isinstance(error, ValueError)
    assert str(error).startswith(f"unknown method {given!r}; did you mean '{suggested}'")


def test_nothing_near_is_nothing_suggested():
    text = str(unknown("task", "zzzz", ["wine", "digits"]))
    assert text == "unknown task 'zzzz' (known: digits, wine)"
    assert str(unknown("task", "x", [])) == "unknown task 'x' (known: )"


def test_a_long_list_is_cut_after_thirty_names():
    text = str(unknown("paper", "zzz", [f"paper{i:03}" for i in range(50)]))
    assert text.endswith("paper029, ...)")
    assert "paper030" not in text
