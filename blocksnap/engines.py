"""The engines that run a pool, by name; both have the same calls."""

from .errors import ArgumentError
from .kernel_pool import KernelDevice, KernelPool
from .user_pool import UserDevice, UserPool

__all__ = ["DEFAULT_ENGINE", "ENGINES", "Engine", "EngineDevice", "engine_named"]

Engine = UserPool | KernelPool
EngineDevice = UserDevice | KernelDevice

ENGINES: dict[str, type[UserPool] | type[KernelPool]] = {kind.name: kind for kind in (UserPool, KernelPool)}
DEFAULT_ENGINE = UserPool.name


def engine_named(name: str) -> type[UserPool] | type[KernelPool]:
    if name not in ENGINES:
        raise ArgumentError(f'"{name}" is no engine: use {" or ".join(map(repr, ENGINES))}')
    return ENGINES[name]
