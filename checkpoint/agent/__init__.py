"""The checkpoint agent: one process a node, beside the engine, that talks to the store so that the engine need not.

It owns the snapshot slots, runs attempts that the log orders, uploads what the ranks snapshot, and commits. The engine
holds no credentials and never waits for storage. Who does what:

    link.py          the Unix socket: connections, messages, descriptors
    slots.py         the shared-memory slots: creation, reading under hold, filling for a restore
    gang.py          an attempt's ranks on this node; the agent's options
    events.py        what the machine hears (decode.py: out of the engine's messages); effects.py: what it wants done
    attempt.py       an attempt's phases, with the table of moves, and what is known of its ranks
    machine.py       decides, pure: events into effects; its invariants (course.py: the steps of an attempt)
    rules.py         the invariants, asserted after every event
    actions.py       does the effects; service.py: the loop around all of them; __main__.py: the command line
    watch.py         the log, folded as it grows
    ahead.py         token shards, fetched ahead of the ranks that read them (cache.py: into files; window.py: which)
    prepare.py       plan, data, slots and restore point of an attempt (fetch.py: from the store, verified)
    meet.py          who is a node of an attempt, and the nodes' addresses
    devices.py       what the ranks run on: the CPU or which CUDA devices
    kernel_log.py    what NVIDIA's driver says of a rank's device
    attempt_file.py  what the ranks are told
    algorithms.py    the run's choice of algorithms for GPUs, created once in the store
    adopt.py         what an agent leaves for the one after it
    upload.py        a held snapshot into chunks in the store, and this node's part manifest
    commit.py        all parts seen -> manifest -> log record, by whichever agent gets there first
    metrics.py       what Prometheus asks of the agent
    output.py        metrics segments and the ring of each rank's output
    beat.py          the heartbeat's thread, and how much the other hints may ask
    gather.py        what all nodes wrote, read once by one of them
    status.py        the live hint that the driver watches
"""
