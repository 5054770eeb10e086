"""Named parts: a table for each kind, errors that list the choices."""

import difflib
import importlib
import inspect
import numbers
from collections.abc import Mapping


class Registry(Mapping):
    """The parts of one ``kind``, {name: "module:Class" within ``package``, imported at first use, or the class}."""

    def __init__(self, kind, package, parts):
        self.kind, self.package, self.parts = kind, package, dict(parts)

    def __getitem__(self, name):
        """The class called ``name``; ValueError that lists the choices for an unknown one."""
        part = lookup(self.kind, name, self.parts)
        if isinstance(part, str):
            module, attribute = part.split(":")
            part = getattr(importlib.import_module(f"{self.package}.{module}"), attribute)
        return part

    def __iter__(self):
        return iter(sorted(self.parts))

    def __len__(self):
        return len(self.parts)

    def __contains__(self, name):
        return name in self.parts

    def build(self, name, options, **given):
        """The part called ``name`` with the user's ``options`` and what it names of those ``given`` by us.

        Raises ValueError for an unknown name or option.
        """
        part = self[name]
        check_options(self.kind, name, options, part, without=given)
        named = options_of(part)
        return part(**{key: value for key, value in given.items() if key in named}, **options)


def lookup(kind, name, table):
    """The entry of ``table`` called ``name``; raises ValueError that lists the choices and the nearest one."""
    if isinstance(name, str) and name in table:
        return table[name]
    raise ValueError(f"{kind}: got {name!r}{nearest(name, table)}, allowed: {', '.join(sorted(table))}")


def nearest(name, options):
    """The addition (did you mean 'x'?) with the one of ``options`` most like ``name``, or nothing."""
    near = difflib.get_close_matches(str(name), list(options), n=1, cutoff=0.5)
    return f" (did you mean {near[0]!r}?)" if near and near[0] != str(name) else ""


def choose(key, value, allowed):
    """``value`` where it is among ``allowed``; raises ValueError that lists these."""
    if value not in tuple(allowed):
        raise ValueError(f"{key}: got {value!r}, allowed: {', '.join(map(str, allowed))}")
    return value


def at_least(least, **values):
    """Raise ValueError unless each of ``values`` {key: number} is ``least`` or more."""
    for key, value in values.items():
        if not (isinstance(value, numbers.Real) and value >= least):
            raise ValueError(f"{key}: got {value!r}, allowed: {least} and more")


def within(least, most, **values):
    """Raise ValueError unless each of ``values`` {key: number} is an integer from ``least`` to ``most``."""
    for key, value in values.items():
        if isinstance(value, bool) or not isinstance(value, numbers.Integral) or not least <= value <= most:
            raise ValueError(f"{key}: got {value!r}, allowed: integers from {least:,} to {most:,}")


def check_options(kind, name, options, constructor, *, without=()):
    """Raise ValueError for ``options`` that ``constructor`` does not take, or that only we pass (``without``)."""
    allowed = options_of(constructor) - set(without)
    unknown = sorted(set(options) - allowed)
    if unknown:
        raise ValueError(f"{kind} {name!r} options: got {', '.join(unknown)}, allowed: {', '.join(sorted(allowed))}")


def options_of(constructor):
    """Names of the options that ``constructor`` takes, also those that a class hands on to its bases as **options."""
    names = set()
    for kind in getattr(constructor, "__mro__", (constructor,)):
        own = inspect.signature(kind if kind is constructor else kind.__init__).parameters.values()
        names |= {p.name for p in own if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)} - {"self"}
        if not any(p.kind is p.VAR_KEYWORD for p in own):
            break
    return names
