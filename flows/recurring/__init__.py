"""Runs that come again: when a schedule fires and which of its firings start, what the next run of a chain begins from,
the runs of a sweep, and who hears how they ended.
"""
