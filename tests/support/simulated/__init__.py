"""Months of a run's life on a cluster in seconds: the shipped driver, through seeded faults of every class.

    model.py       how long things take, and what goodput is
    cluster.py     machines, pods, gangs, launches: simulated, told by the shipped diagnosis and status
    world.py       one run: its log, what is true of it, and who witnesses it
    drivers.py     drivers: the shipped loop, ``decide``, log and readers over a store, a launcher and a clock that may
                   fail, lie late, stand still or jump
    faults.py      what strikes, when
    campaign.py    run after run (``make simulate-faults``)
    mistakes.py    that it must find

Of the product nothing is replaced: what is injected are clocks, stores and a launcher (docs/adr/0004).
"""
