"""``python -m flows.cli``: the command, where it is not installed as ``hotstage``."""

from flows.cli.main import main

main()
