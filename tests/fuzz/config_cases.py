"""Configs made at random from the schema itself, so that a new option is tried without a word here."""

import random
import typing
from dataclasses import dataclass
from typing import Any

import yaml

from lit_parallel.options import Group, Option, fields_of, iterate_groups, join_key, option_keys

# What no option expects, or only some do.
ODD_VALUES = [
    *(None, True, False, -1, 0, 1, 2, 3, 8, 1.5, 1e-30, 1e308, float("nan"), float("inf"), float("-inf")),
    *(2**31, 2**32, 2**63, 2**64, 10**30, "9" * 30, "", " ", "auto", "1", "true", "null", "test", "x" * 5000),
    *("???", "${seed}", "${nowhere}", "${model}", "${oc.env:HOME}", "${", "\\${seed}"),
    *("a\nb", "\x1b[31mred", "ä\u2028ß", "../..", "/", "/dev/zero", "~"),
    *("os.system", "lit_parallel.errors.UserError", "http://localhost:1/a.ckpt"),
    *([], [1], [0, 1], ["a"], [[]], [None], [-1, 2**40]),
    *({}, {"a": 1}, {"name": "made"}, {1: 2}, {"_target_": "os.system"}),
]
# YAML that is not data, not finite, or not YAML.
ODD_TEXTS = [
    *("!!python/object/apply:os.system [id]", "!!python/name:os.system", "!!binary aGk=", "!!int x", "2020-01-01"),
    *("0x1F", "&a [*a]", "*a", "[", "{", "[" * 500, "{a: " * 500, "1_000", "1:30", "'", '"', "\t", "- 1", "? 1"),
    *("<<: 1", "@", "%x"),
]


@dataclass(frozen=True)
class Assignment:
    """One option with a value, or with a text that is to be read as YAML."""

    key: str
    value: Any
    is_text: bool = False

    def override(self) -> str:
        """As on the command line."""
        if self.is_text:
            return f"{self.key}={self.value}"
        text = yaml.safe_dump(self.value, default_flow_style=True, allow_unicode=True, width=10**6)
        return f"{self.key}={text.removesuffix('...' + chr(10)).strip()}"


def assignments(random: random.Random, schema: type, number: int) -> list[Assignment]:
    """So many options with values, of which most fit, some do not, and some are no options at all."""
    known = _options(schema)
    made = []
    for _ in range(number):
        key, hint, spec = random.choice(known)
        odd = random.random()
        if odd < 0.05:
            made.append(Assignment(_typo(random, key), _fitting(random, hint, spec)))
        elif odd < 0.07:
            made.append(Assignment(key.rpartition(".")[0] or key, random.choice(ODD_VALUES)))  # a group, or an option
        elif odd < 0.1:
            made.append(Assignment(key, random.choice(ODD_TEXTS), is_text=True))
        elif odd < 0.18:
            made.append(Assignment(key, random.choice(ODD_VALUES)))
        elif odd < 0.3:
            made.append(Assignment(key, random.choice(_ends(spec) or ODD_VALUES)))
        else:
            made.append(Assignment(key, _fitting(random, hint, spec)))
    return made


def limits(schema: type) -> list[Assignment]:
    """Every option that has limits, at each of them."""
    return [
        Assignment(key, [bound] if typing.get_origin(hint) is list or list[int] in typing.get_args(hint) else bound)
        for key, hint, spec in _options(schema)
        for bound in (spec.minimum, spec.maximum)
        if bound is not None
    ]


def nested(made: list[Assignment]) -> dict[Any, Any]:
    """The values as a config file holds them; a later one replaces an earlier one that stands in its way."""
    container: dict[Any, Any] = {}
    for assignment in made:
        *groups, name = assignment.key.split(".")
        inner = container
        for part in groups:
            if not isinstance(inner.get(part), dict):
                inner[part] = {}
            inner = inner[part]
        inner[name] = assignment.value
    return container


def _options(schema: type) -> list[tuple[str, Any, Option]]:
    found = [
        (join_key(key, name), typing.get_type_hints(type(member))[name], spec)
        for key, member in iterate_groups(schema())
        for name, spec in fields_of(member).items()
        if not isinstance(spec, Group)
    ]
    assert {key for key, _, _ in found} == set(option_keys(schema()))
    return found


def _fitting(random: random.Random, hint: Any, spec: Option) -> Any:
    """A value of the type and within the limits; a small one."""
    arguments = typing.get_args(hint)
    if type(None) in arguments and random.random() < 0.2:
        return None
    kinds = [kind for kind in (arguments or (hint,)) if kind is not type(None)]
    if typing.get_origin(hint) is list:
        return [_fitting(random, arguments[0], spec) for _ in range(random.randint(1, 3))]
    kind = random.choice(kinds)
    if kind not in (bool, int, float, str):
        return _fitting(random, kind, spec) if typing.get_args(kind) else kind
    if kind is bool:
        return random.random() < 0.5
    if kind is str:
        return random.choice(spec.choices or ("a", "auto", "some text"))
    low = next((bound for bound in (spec.minimum, spec.above) if bound is not None), -3)
    high = next((bound for bound in (spec.maximum, spec.below) if bound is not None), low + 16)
    high = min(high, low + 16)
    if kind is int:
        return random.randint(int(low) + (spec.above is not None), int(high))
    return random.uniform(low, high)


def _ends(spec: Option) -> list[Any]:
    """Just within the limits, and just outside."""
    bounds = [bound for bound in (spec.minimum, spec.maximum, spec.above, spec.below) if bound is not None]
    return [bound + step for bound in bounds for step in (-1, 0, 1, -1e-9, 1e-9)] + list(spec.choices or ())


def _typo(random: random.Random, key: str) -> str:
    place = random.randrange(len(key))
    letter = random.choice("aeiou._-[0 ")
    return random.choice(
        [
            key[:place] + key[place + 1 :],
            key[:place] + letter + key[place:],
            key[:place] + letter + key[place + 1 :],
            key.upper(),
            key.replace(".", "_"),
            f"trainer.{key}",
        ]
    )
