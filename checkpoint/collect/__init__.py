"""Who deletes, what, and when: the rules of what a run keeps, pins, tombstones and the collector.

Order of calls. Whoever reads a checkpoint for long: ``pins.pinned`` around it. The collector (an identity of its own,
or whoever owns a folder): ``collector.collect`` folds the log, asks ``retention.keep`` (pure) what stays, writes a
tombstone for what does not, and deletes the objects of tombstones whose grace is over by the store's clock.
"""
