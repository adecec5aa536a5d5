"""Layer tars: apply one to a directory, find what changed in a directory, pack that as a layer."""

from .changes import Change, ChangeKind, changes, diff_size
from .extract import LayerStats, Limits, apply_layer
from .pack import pack_diff
from .pruned import Unchanged

__all__ = [
    "Change",
    "ChangeKind",
    "LayerStats",
    "Limits",
    "Unchanged",
    "apply_layer",
    "changes",
    "diff_size",
    "pack_diff",
]
