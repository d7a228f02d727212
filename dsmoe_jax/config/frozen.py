"""A dictionary that cannot change, so that a config with sections by name can be hashed."""

from __future__ import annotations

from typing import Any, NoReturn, TypeVar

K = TypeVar("K")
V = TypeVar("V")


class FrozenDict(dict[K, V]):
    """A read-only `dict` with a hash: `FrozenDict(expert=BalanceTerm(0.01))`."""

    def __hash__(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return hash(frozenset(self.items()))

    def __repr__(self) -> str:  # else the repr of a config would be that of one without a hash
        return f"FrozenDict({super().__repr__()})"

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError("a config cannot change; use dsmoe_jax.config.replace")

    __setitem__ = __delitem__ = __ior__ = _refuse
    clear = pop = popitem = setdefault = update = _refuse  # pyright: ignore
