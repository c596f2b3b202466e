"""The planner: which layout a model, a batch and a cluster want, and why. Pure: numbers in, numbers and text out.

    cluster.py     the sheet of a cluster: nodes, devices, links, failures
    costs.py       what a layer, the embedding and the head do and keep, from the family's own kernel calls
    times.py       seconds of that on a device; the shares of peak that published runs reach
    layouts.py     a layout, and what of it this engine runs
    pipelines.py   schedules in closed form: step, bubble, in flight; the same played out, instruction by instruction
    links.py       who is near whom: placement in closed form, link classes, bytes and seconds a class
    estimate.py    a layout's step: time by part, memory a position by kind, traffic, MFU, goodput
    search.py      all layouts, the best ones, and why the others lost
    describe.py    a plan as text, as JSON and as a file
    published.py   runs that others published, foretold by the same code

It compiles nothing: ``hotstage plan`` without a cluster does that, and tests compare the two where both can be had.
"""
