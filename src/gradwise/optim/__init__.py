"""Optimizers, schedules and what sets them: `torch.optim.Optimizer` and `LRScheduler` subclasses."""

from gradwise.core.rooms import public_names

globals().update(public_names(__name__))
