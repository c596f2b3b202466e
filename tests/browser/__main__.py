"""Before `make test-browser`: Debian's chromium and its driver, installed where they are missing and this user may.

Exits 69 with a word where they cannot be had here.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

from tests.browser.browser import missing

UNAVAILABLE = 69


def main() -> int:
    gone = missing()
    if not gone:
        return 0
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        print(
            f"the browser's tests need {' and '.join(gone)}: apt-get install chromium chromium-driver (as root)",
            file=sys.stderr,
        )
        return UNAVAILABLE
    print("installing chromium and chromium-driver for the browser's tests", file=sys.stderr)
    env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    command = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", "chromium", "chromium-driver"]
    done = subprocess.run(["apt-get", "update", "-qq"], env=env, stdout=sys.stderr).returncode
    done = done or subprocess.run(command, env=env, stdout=sys.stderr).returncode
    if done or missing():
        print("chromium could not be installed: the browser's tests are not run", file=sys.stderr)
        return UNAVAILABLE
    return 0


if __name__ == "__main__":
    sys.exit(main())
