"""What every test may count on, however the test command itself was started."""

from __future__ import annotations

import signal

# a shell that runs its commands in the background has them ignore Ctrl-C, and so would every process of the tests
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
