"""Stands in for safetensors on a machine that has none (a GPU session's)."""
