"""Where a gradient comes from: backpropagation, forward passes, a fixed point."""

from gradwise.core.rooms import public_names

globals().update(public_names(__name__))
