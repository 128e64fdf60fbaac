"""What the signature of a word says: the arguments it takes, whether values fit their types, and calling it with what surrounds it.

Values come from TOML, so they are checked as JSON is: a list may stand for a tuple and 1 for 1.0, but "1" stands for no number.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import json
import re
import typing
from collections.abc import Callable, Mapping
from typing import Any

import pydantic
import torch
from torch import nn

from gradwise.core.search_space import Choice, Range, SearchSpace

SUPPLIED = {"self", "params", "optimizer", "generator", "total_steps", "T_max", "module", "name", "last_epoch"}
"""Arguments that compare gives itself and a recipe may not."""


def arguments(target: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The arguments that a recipe may give to a word.

    Example:
        >>> list(arguments(nn.utils.parametrizations.spectral_norm))
        ['n_power_iterations', 'eps', 'dim']
    """
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    found = {key: p for key, p in inspect.signature(target).parameters.items() if p.kind in kinds and key not in SUPPLIED}
    for key in _hints(target):  # the options of **engine: Unpack[EngineOptions] are arguments too
        if key not in {*inspect.signature(target).parameters, *SUPPLIED, "return"}:
            found[key] = inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=...)
    return found


def takes(target: Callable[..., Any]) -> str:
    """The same, for an error message.

    Example:
        >>> takes(nn.utils.parametrizations.weight_norm)
        'dim=0'
    """
    said = [
        key if p.default is p.empty else f"{key}={'...' if p.default is ... else repr(p.default)}"
        for key, p in arguments(target).items()
    ]
    return ", ".join(said) or "no arguments"


def problems(target: Callable[..., Any], given: Mapping[str, Any], tuned: SearchSpace) -> list[str]:
    """Everything wrong with what a word is given: names, types, values it refuses, and what it still needs.

    Args:
        target: the word's class or function.
        given: arguments with a value.
        tuned: arguments that get theirs from a search space (see `wrong_ranges`).

    Example:
        >>> problems(torch.optim.SGD, {"lr": -1.0, "momentun": 0.9}, {})
        ["unknown argument 'momentun', did you mean 'momentum'?", 'Invalid learning rate: -1.0']
    """
    parameters, hints = arguments(target), _hints(target)
    wrong: dict[str, str] = {}
    for key, value in given.items():
        if key not in parameters:
            near = difflib.get_close_matches(key, parameters, n=1)
            hint = f", did you mean {near[0]!r}?" if near else ""
            wrong[key] = f"{key} is set by compare itself" if key in SUPPLIED else f"unknown argument {key!r}{hint}"
        elif (mismatch := _mismatch(key, value, hints)) is not None:
            wrong[key] = mismatch
    missing = [key for key in _required(parameters) if key not in {*given, *tuned}]
    told = [*wrong.values(), *(f"needs {key} ({_type_name(hints.get(key, Any))})" for key in missing)]
    required = _required(parameters)
    if missing or any(key in wrong for key in required):
        return told
    first = {key: _ends(declared)[0] for key, declared in tuned.items() if key in parameters}
    needed = {key: value for key, value in first.items() if key in required}

    def refused(values: Mapping[str, Any]) -> str | None:
        alone = _refusal(target, {**needed, **values})  # a value may also need one that is tuned, as nesterov needs momentum
        return None if alone is None or _refusal(target, {**first, **values}) is None else alone

    usable = {key: value for key, value in given.items() if key not in wrong}
    while usable and (refusal := refused(usable)) is not None:
        told.append(refusal)
        without = ({k: v for k, v in usable.items() if k != key} for key in usable if key not in required)
        usable = next((rest for rest in without if refused(rest) != refusal), {})  # less the argument that it speaks of
    return told


def wrong_ranges(target: Callable[..., Any], given: Mapping[str, Any], tuned: SearchSpace) -> dict[str, str]:
    """What is wrong with search spaces, by argument: both ends of each range are tried, alone and beside the others.

    Args:
        target: the word's class or function.
        given: arguments with a value, without mistakes of their own (see `problems`).
        tuned: arguments with a search space.

    Example:
        >>> from gradwise.core.search_space import Uniform
        >>> wrong_ranges(torch.optim.SGD, {}, {"lr": Uniform(-1.0, 1.0), "momentum": Choice(("much",))})
        {'momentum': "momentum must be float, got 'much'", 'lr': 'Invalid learning rate: -1.0'}
    """
    parameters, hints = arguments(target), _hints(target)
    ends = {key: _ends(declared) for key, declared in tuned.items() if key in parameters}
    wrong = {key: told for key, values in ends.items() for v in values if (told := _mismatch(key, v, hints)) is not None}
    first = {key: values[0] for key, values in ends.items() if key not in wrong}
    beside: dict[str, Any] = {**{key: value for key, value in first.items() if key in _required(parameters)}, **given}
    if _refusal(target, beside) is not None:
        beside = {**first, **given}  # what is given needs one that is tuned, as nesterov needs momentum
    for key, values in ends.items():
        refused = next((told for v in values if key not in wrong and (told := _refusal(target, {**beside, key: v}))), None)
        if refused:
            wrong[key] = refused
    if not wrong:
        refused = next((told for corner in _corners(ends) if (told := _refusal(target, {**given, **corner}))), None)
        wrong = {", ".join(ends): refused} if refused else {}
    return wrong


def call(target: Callable[..., Any], given: Mapping[str, Any], supplied: Mapping[str, Any]) -> Any:
    """Call a word with its own arguments, and with those of its surroundings that its signature takes.

    Example:
        >>> params = [torch.zeros(1, requires_grad=True)]
        >>> call(torch.optim.Adam, {"betas": [0.8, 0.9]}, {"params": params, "total_steps": 100}).param_groups[0]["betas"]
        (0.8, 0.9)
    """
    taken, hints = inspect.signature(target).parameters, _hints(target)
    own = {key: _converted(value, hints.get(key)) for key, value in given.items()}
    return target(**{key: value for key, value in supplied.items() if key in taken}, **own)


def _required(parameters: Mapping[str, inspect.Parameter]) -> list[str]:
    return [key for key, p in parameters.items() if p.default is p.empty]


def _mismatch(key: str, value: Any, hints: Mapping[str, Any]) -> str | None:
    return None if _fits(value, hints.get(key)) else f"{key} must be {_type_name(hints[key])}, got {value!r}"


def _refusal(target: Callable[..., Any], given: Mapping[str, Any]) -> str | None:
    """Call a word once in surroundings of straw, so that its own checks of ranges speak before any work is done."""
    straw = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    params = [torch.zeros(2, requires_grad=True)]
    try:
        call(target, given, {"params": params, "optimizer": straw, "total_steps": 100, "T_max": 100, "module": nn.Linear(2, 2)})
    except (ValueError, TypeError) as error:
        return str(error)
    return None


def _corners(ends: Mapping[str, tuple[Any, ...]]) -> list[dict[str, Any]]:
    """The first values of all ranges together, then each other value on its own."""
    first = {key: values[0] for key, values in ends.items()}
    return [first, *({**first, key: value} for key, values in ends.items() for value in values[1:])]


def _ends(declared: Range) -> tuple[Any, ...]:
    return declared.values if isinstance(declared, Choice) else (declared.low, declared.high)


def _hints(target: Callable[..., Any]) -> dict[str, Any]:
    try:
        hints = typing.get_type_hints(target.__init__ if inspect.isclass(target) else target)
        for key, p in inspect.signature(target).parameters.items():
            if p.kind is p.VAR_KEYWORD and typing.get_origin(hint := hints.pop(key, None)) is typing.Unpack:
                options = {k: v for k, v in typing.get_type_hints(typing.get_args(hint)[0]).items() if k not in hints}
                hints |= dict(sorted(options.items()))
        return hints
    except (NameError, TypeError):  # names that exist for type checkers alone: the word's own checks must do
        return {}


@functools.cache
def _adapter(hint: Any) -> pydantic.TypeAdapter[Any] | None:
    try:
        return pydantic.TypeAdapter(hint, config=pydantic.ConfigDict(arbitrary_types_allowed=True))
    except (pydantic.PydanticUserError, pydantic.PydanticSchemaGenerationError):
        return None


def _fits(value: Any, hint: Any) -> bool:
    try:
        _converted(value, hint)
    except (pydantic.ValidationError, TypeError):
        return False
    return True


def _converted(value: Any, hint: Any) -> Any:
    adapter = _adapter(hint) if hint is not None else None
    return value if adapter is None else adapter.validate_json(json.dumps(value), strict=True)


def _type_name(hint: Any) -> str:
    """A type as a recipe's author would say it, without the types that cannot be written in a recipe."""
    if typing.get_origin(hint) is typing.Literal:
        return "one of " + ", ".join(map(repr, typing.get_args(hint)))
    text = hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)
    text = re.sub(r"\b(?:[a-z_]+\.)+", "", text)
    return re.sub(r" \| (?:Tensor\b|Generator\b|ndarray\[.*\])", "", text)
