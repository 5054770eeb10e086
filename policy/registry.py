"""Looking a name up in a small table, with an error that helps."""

import difflib
import inspect


def lookup(kind, name, table):
    """The entry of ``table`` called ``name``; raises ValueError that lists the choices and the nearest one."""
    if name in table:
        return table[name]
    near = difflib.get_close_matches(str(name), list(table), n=1, cutoff=0.5)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    raise ValueError(f"{kind}: got {name!r}{hint}, allowed: {', '.join(sorted(table))}")


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
