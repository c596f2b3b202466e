"""Driving a run: what the log and the nodes say, what to do next (pure), and the thin loop that does it."""
