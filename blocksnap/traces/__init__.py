"""Block traces: arrays of requests."""

from .request import DISCARD, FLUSH, READ, REQUEST, WRITE

__all__ = ["DISCARD", "FLUSH", "READ", "REQUEST", "WRITE"]
