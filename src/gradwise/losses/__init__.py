"""What to descend: losses as `nn.Module` and as functions of the same math."""

from gradwise.core.rooms import public_names

globals().update(public_names(__name__))
