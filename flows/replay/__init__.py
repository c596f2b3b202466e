"""Computing steps of a run again, and what comes of comparing them.

recorded.py   what the run's own metrics say of its steps, exactly as they were said
again.py      the same steps, computed by a gang of their own in a folder of their own
compare.py    the two side by side, and which ranks and nodes a difference points to (pure)
replay.py     all of it: ``hotstage replay``
"""
