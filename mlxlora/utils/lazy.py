"""Sequences whose items are read or made when they are used."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, TypeVar, overload

_Item = TypeVar("_Item", covariant=True)


class LazySequence(Sequence[_Item]):
    """A sequence of which a class says its length and the item at a place; a slice is a list."""

    __slots__ = ()

    @abstractmethod
    def item(self, index: int) -> _Item:
        """The item at a place, which counts from 0."""

    @overload
    def __getitem__(self, index: int) -> _Item: ...
    @overload
    def __getitem__(self, index: slice) -> list[_Item]: ...
    def __getitem__(self, index: int | slice) -> Any:
        places = range(len(self))[index]
        return list(map(self.item, places)) if isinstance(places, range) else self.item(places)
