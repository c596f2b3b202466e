"""The checkpoint protocol as it is shipped: several processes inside one, each paused wherever it asks the store.

    hub.py       a simulated clock; processes, and their threads as greenlets
    gate.py      the store as a process sees it, and where it may be struck
    state.py     what is trained: layouts, and the state that is true at each step
    engine.py    a node's supervisor and ranks, simulated
    agent.py     an agent: the shipped machine, uploader, committer, watcher, preparer, claims
    driver.py    a driver: the shipped loop with all that it calls; its launcher is the world
    persons.py   who orders and forks, by the commands' own functions
    runs.py      real specs, plans and names of the runs, whose ranks keep a few numbers
    world.py     one run and its witness; place.py: the store that several share, and what strikes there
    chaos.py     campaigns of kills at named points (``make chaos-checkpoint``)
    tree.py, search.py, small.py, worlds.py, s3.py
                 every order of events of small worlds
    mistakes.py  that both must find

Nothing in the product helps (docs/adr/0004): what is injected are clocks, stores and tokens.
"""
