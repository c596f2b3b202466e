"""Where the C engine's binary lies: ``HOTSTAGE_ENGINE``, else what the installation put beside this package."""

from __future__ import annotations

import os
import sys
import sysconfig
from pathlib import Path

from trainer.errors import LaunchError

NAME = "hotstage-engine"


def engine_binary() -> Path:
    """The engine to run. Raises LaunchError where there is none, saying where it looked.

    In a source tree the compiled binary lies in the environment that ``make setup`` filled, not beside the sources, so
    the environment's packages are asked too.
    """
    named = os.environ.get("HOTSTAGE_ENGINE")
    if named:
        path = Path(named).absolute()
        if not os.access(path, os.X_OK) or path.is_dir():
            raise LaunchError(f"HOTSTAGE_ENGINE names {path}, which is no program; unset it or give the engine's path")
        return path
    places = [Path(__file__).resolve().parent / "bin" / NAME]
    places += [Path(sysconfig.get_path(kind)) / "trainer" / "bin" / NAME for kind in ("platlib", "purelib")]
    for place in places:
        if os.access(place, os.X_OK):
            return place
    looked = ", ".join(dict.fromkeys(str(place) for place in places))
    raise LaunchError(f"the engine is not built: no {looked}; run 'make setup', or name it in HOTSTAGE_ENGINE")


if __name__ == "__main__":
    sys.stdout.write(f"{engine_binary()}\n")
