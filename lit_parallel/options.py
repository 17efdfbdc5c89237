"""How options are declared, described and checked: a dataclass field with a default and one line of explanation."""

import dataclasses
import json
import math
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lit_parallel.errors import UserError, did_you_mean

# The largest seed that NumPy, and so Lightning, takes.
MAX_SEED = 2**32 - 1

_MOST_LETTERS = 200  # of a value in an error message

# Words for the types that a config can hold, in error messages and in --help.
_TYPE_NAMES = {
    int: "integer",
    float: "number",
    bool: "true/false",
    str: "text",
    dict: "mapping",
    types.NoneType: "null",
}


@dataclass(frozen=True)
class Option:
    """What is known about one option besides its type and default; bounds and choices hold for each item of a list."""

    help: str
    choices: tuple[str, ...] | None = None
    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None
    below: float | None = None
    non_empty: bool = False

    @property
    def limits(self) -> str:
        """The allowed range, such as ``">= 0 and < 1"`` or ``"from 0 to 0.5"``; empty if there is none."""
        if self.minimum is not None and self.maximum is not None:
            return f"from {self.minimum} to {self.maximum}"
        bounds = {">=": self.minimum, ">": self.above, "<=": self.maximum, "<": self.below}
        return " and ".join(f"{sign} {bound}" for sign, bound in bounds.items() if bound is not None)

    def contains(self, number: float) -> bool:
        """Tell whether a number lies in the allowed range; neither NaN nor an infinity ever does."""
        return (
            math.isfinite(number)
            and (self.minimum is None or number >= self.minimum)
            and (self.maximum is None or number <= self.maximum)
            and (self.above is None or number > self.above)
            and (self.below is None or number < self.below)
        )

    def check(self, key: str, value: Any) -> None:
        """Raise a `UserError` about the option ``key`` unless ``value`` is among its choices and in its range."""
        if self.non_empty and value in ("", []):
            raise UserError(f"Option '{key}' must not be empty.")
        if isinstance(value, list):
            for index, item in enumerate(value):
                self.check(f"{key}[{index}]", item)
        elif isinstance(value, str) and self.choices is not None and value not in self.choices:
            raise UserError(f"Option '{key}' cannot be '{value}'.{did_you_mean(value, self.choices)}")
        elif isinstance(value, int | float) and not self.contains(value):
            wanted = self.limits if math.isfinite(value) else "a finite number"
            raise UserError(f"Option '{key}' must be {wanted}, not {value}.")


@dataclass(frozen=True)
class Group:
    """What is known about a nested group of options; ``kinds`` are the dataclasses that its ``name`` chooses from."""

    help: str
    kinds: Mapping[str, type] | None = None


def option(
    default: Any,
    help: str,
    choices: Sequence[str] | None = None,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    below: float | None = None,
    non_empty: bool = False,
) -> Any:
    """Declare an option of a config group.

    Args:
        default: The default value; a list or dict is copied for every instance.
        help: One line of explanation, shown by ``--help``.
        choices: The allowed values of a text option, or of the items of a list.
        minimum: The smallest allowed number, or item of a list.
        maximum: The largest allowed number.
        above: A number that the value must exceed.
        below: A number that the value must stay under.
        non_empty: Whether an empty text or list is refused.
    """
    choices = tuple(choices) if choices is not None else None
    metadata = {"spec": Option(help, choices, minimum, maximum, above, below, non_empty)}
    if isinstance(default, (list, dict)):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def group(default: Callable[[], Any], help: str, kinds: Mapping[str, type] | None = None) -> Any:
    """Declare a nested group of options.

    Args:
        default: Makes the group with its defaults: its dataclass, or a function that returns an instance.
        help: One line of explanation, shown by ``--help``.
        kinds: For a group of several kinds, the dataclass for each value of the group's option ``name``.
    """
    return field(default_factory=default, metadata={"spec": Group(help, kinds)})


def fields_of(options: Any) -> dict[str, Option | Group]:
    """Return what is known about each field of an options dataclass (or of an instance), by name."""
    return {item.name: item.metadata["spec"] for item in dataclasses.fields(options)}


def iterate_groups(options: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the full key and an instance of a group and of all groups within it.

    A group of several kinds is yielded once for each kind, under the same key.
    """
    yield key, options
    for name, spec in fields_of(options).items():
        if isinstance(spec, Group):
            chosen = getattr(options, name)
            others = [kind() for kind in (spec.kinds or {}).values() if kind is not type(chosen)]
            for member in (chosen, *others):
                yield from iterate_groups(member, join_key(key, name))


def option_keys(options: Any) -> list[str]:
    """Return the full keys of all options of a group and of the groups within it."""
    keys = [
        join_key(key, name)
        for key, member in iterate_groups(options)
        for name, spec in fields_of(member).items()
        if isinstance(spec, Option)
    ]
    return list(dict.fromkeys(keys))


def check_options(options: Any, key: str = "") -> None:
    """Raise a `UserError` if any option, at any depth, is outside its choices or its range."""
    for name, spec in fields_of(options).items():
        value = getattr(options, name)
        if isinstance(spec, Group):
            check_options(value, join_key(key, name))
        else:
            spec.check(join_key(key, name), value)


def join_key(prefix: str, name: object) -> str:
    """Return the full key of an option: ``optimizer`` and ``lr`` make ``optimizer.lr``."""
    return f"{prefix}.{name}" if prefix else str(name)


def describe_type(hint: Any) -> str:
    """Put a type into words: ``list[int] | None`` is ``"list of integers or null"``."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        words = [describe_type(argument) for argument in arguments]
        return f"{', '.join(words[:-1])} or {words[-1]}"
    if origin is typing.Literal:
        return " or ".join(repr(argument) for argument in arguments)
    if origin is list:
        return f"list of {describe_type(arguments[0])}s"
    return _TYPE_NAMES[origin or hint]


def format_value(value: Any) -> str:
    """Write a value as an error message shows it: text in quotes, the rest as in YAML; not more than fits a line."""
    try:
        text = repr(value) if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    except (TypeError, ValueError):  # keys that YAML does not know, or a value that holds itself
        text = repr(value)
    return text if len(text) <= _MOST_LETTERS else f"{text[:_MOST_LETTERS]}..."
