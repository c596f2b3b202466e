"""Checkpoints evaluated beside training: validation loss, samples, commands of the user (docs/watch.md)."""
