"""Looking a name up in a small table, with an error that helps."""

import difflib


def lookup(kind, name, table):
    """The entry of ``table`` called ``name``; raises ValueError that lists the choices and the nearest one."""
    if name in table:
        return table[name]
    near = difflib.get_close_matches(str(name), list(table), n=1, cutoff=0.5)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    raise ValueError(f"{kind}: got {name!r}{hint}, allowed: {', '.join(sorted(table))}")
