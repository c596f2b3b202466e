"""A package of its own, so that `python -m tests.gpu` finds this one where another is installed by the same name."""
