"""gradwise: published gradient methods that compose in one training step, each with a runnable check of its paper's claim."""

from gradwise import papers
from gradwise.core.protocols import supervised
from gradwise.step import Step, StepReport

__version__ = "0.1.0"
__all__ = ["Step", "StepReport", "__version__", "papers", "supervised"]
