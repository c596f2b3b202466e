"""A run's numbers where people look beside Prefect's page: TensorBoard, W&B, MLflow, Prometheus (docs/watch.md).

Fed by the driver's events and, for what no driver of this place heard, by the store; nobody waits for any of it.
"""
