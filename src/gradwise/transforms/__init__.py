"""What is done to a gradient between the estimator and the optimizer."""

from gradwise.core.rooms import public_names

globals().update(public_names(__name__))
