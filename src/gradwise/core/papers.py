"""The registry of papers: `@paper(...)` on a public name is the only registration there is.

The registry, the docs, the claims and `compare` all find a method through this decorator. It costs nothing at run time: it notes where the
name lives and returns it unchanged.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass
class Paper:
    """One published method and the public names that implement it.

    Attributes:
        id: short name, also the name of the method's file, test and claim.
        title: the paper's title.
        arxiv: arXiv identifier such as "2302.06675", or "" when the paper has none.
        room: the package of gradwise it lives in, such as "optim".
        names: importable paths of what implements it, such as "gradwise.optim.Lion".

    Example:
        >>> Paper("lion", "Symbolic Discovery of Optimization Algorithms", "2302.06675", "optim").names
        []
    """

    id: str
    title: str
    arxiv: str
    room: str
    names: list[str] = field(default_factory=list)


_PAPERS: dict[str, Paper] = {}


def paper(id: str, *, title: str = "", arxiv: str = "") -> Callable[[T], T]:
    """Decorate a public class or function with the paper it implements.

    Args:
        id: the paper's short name. The first use names the title; later names of the same paper give the id alone.
        title: the paper's title.
        arxiv: its arXiv identifier.

    Raises:
        ValueError: the same id with two titles or from two rooms, or a first use without a title.

    Example:
        >>> from gradwise.optim import Lion
        >>> Lion.paper
        'lion'
    """

    def register(target: T) -> T:
        module, name = target.__module__, target.__name__  # type: ignore[attr-defined]
        room = module.split(".")[1] if module.startswith("gradwise.") else module
        known = _PAPERS.get(id)
        if known is None:
            if not title:
                raise ValueError(f"paper {id!r} is first named on {module}.{name}: give its title there")
            known = _PAPERS[id] = Paper(id, title, arxiv, room)
        elif (title and title != known.title) or room != known.room:
            raise ValueError(f"paper {id!r} is {known.title!r} in room {known.room!r}, but {module}.{name} says {title!r} in {room!r}")
        path = f"gradwise.{room}.{name}" if module.startswith("gradwise.") else f"{module}.{name}"
        if path not in known.names:
            known.names.append(path)
        if isinstance(target, type):
            target.paper = id  # type: ignore[attr-defined]
        else:
            vars(target)["paper"] = id
        return target

    return register


def registered() -> dict[str, Paper]:
    """The papers named so far, by id (only of rooms already imported; `gradwise.papers.catalog` imports them all).

    Example:
        >>> import gradwise.optim
        >>> registered()["lion"].room
        'optim'
    """
    return dict(sorted(_PAPERS.items()))


def paper_of(obj: Any) -> str | None:
    """The id of the paper that `obj` (a class, an instance or a function) implements, or None.

    Example:
        >>> from gradwise.optim import AdaBelief
        >>> paper_of(AdaBelief), paper_of(print)
        ('adabelief', None)
    """
    return getattr(obj, "paper", None)
