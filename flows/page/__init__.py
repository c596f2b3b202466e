"""A run on Prefect's page: ``page`` keeps the server true to it from a thread of its own, ``curve`` draws the loss."""

from flows.page.ends import end_message
from flows.page.page import Page

__all__ = ["Page", "end_message"]
