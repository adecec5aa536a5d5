"""Work that ends with the death of its process."""

import os
from collections.abc import Callable

__all__ = ["killed"]


def killed(work: Callable[[], object]) -> bool:
    """Do the work in a child process; return whether it was killed in it."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)
