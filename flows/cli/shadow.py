"""Files that are taken for modules of Python's own. Imports nothing that such a file could stand for."""

from __future__ import annotations

import os
import sys


def shadow(error: BaseException) -> str | None:
    """What to say where modules of Python's own are hidden by files of the same names; None: none of those loaded is.

    Those count that lie in a folder which Python searches before its own: of PYTHONPATH, or the current one for
    ``python -m``. ``error``: what came of it. A file that failed itself is loaded no more, and stands in its trace.
    """
    home = os.path.dirname(os.__file__)
    before = sys.path[: sys.path.index(home)] if home in sys.path else []
    loaded = {name: getattr(module, "__file__", None) for name, module in list(sys.modules.items())}
    trace = error.__traceback__
    while trace is not None:
        loaded.setdefault(str(trace.tb_frame.f_globals.get("__name__")), trace.tb_frame.f_code.co_filename)
        trace = trace.tb_next
    for name in sorted(sys.stdlib_module_names & loaded.keys()):
        for folder in before:
            path = os.path.join(folder, name)
            if loaded[name] in (f"{path}.py", os.path.join(path, "__init__.py")):
                return (
                    f"{loaded[name]} is taken for Python's own module {name!r}, as its folder is searched first "
                    f"({type(error).__name__}: {error}): rename it, or take the folder out of PYTHONPATH"
                )
    return None
