"""The shared checks name the argument and say what was given."""

import math

import pytest
import torch

from gradwise.core.hyperparameters import betas_in_range, fraction, non_negative


@pytest.mark.parametrize("good", [0, 0.0, 1e-30, 3, 1e300, torch.tensor(0.1), torch.tensor([0.1])])
def test_numbers_that_are_not_negative(good):
    non_negative(eps=good)


@pytest.mark.parametrize("bad", [-1e-30, -1, math.nan, math.inf, -math.inf, None, "0.1", True, [0.1], 1j, torch.ones(2), torch.tensor(-1)])
def test_anything_else_is_refused_by_name(bad):
    with pytest.raises(ValueError, match="eps must be a number >= 0, got"):
        non_negative(lr=0.1, eps=bad)


@pytest.mark.parametrize("good", [0, 0.0, 0.5, 1 - 1e-16, torch.tensor(0.9)])
def test_fractions(good):
    fraction(momentum=good)
    betas_in_range((good, good))


@pytest.mark.parametrize("bad", [1, 1.0, -1e-9, math.nan, "0.5", None, True, torch.tensor(1.0), torch.ones(3)])
def test_what_is_not_a_fraction_is_refused_by_name_and_position(bad):
    with pytest.raises(ValueError, match=r"momentum must be in \[0, 1\), got"):
        fraction(momentum=bad)
    with pytest.raises(ValueError, match=r"betas\[1\] must be in \[0, 1\), got"):
        betas_in_range((0.9, bad))
    with pytest.raises(ValueError, match=r"betas\[0\]"):
        betas_in_range([bad, 0.9])


@pytest.mark.parametrize("bad", [0.9, (0.9,), (0.9, 0.99, 0.999), None, "ab", {0.9, 0.99}])
def test_betas_are_a_pair(bad):
    with pytest.raises(ValueError, match="betas must be two numbers"):
        betas_in_range(bad)
