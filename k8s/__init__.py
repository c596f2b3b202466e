"""RunSpec + Plan -> Kubernetes objects. ``render`` is pure; talking to a cluster comes with its launcher."""
