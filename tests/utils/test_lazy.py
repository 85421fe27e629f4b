"""A sequence whose items are made when they are used is the list of them."""

import pytest
from attrs import frozen
from hypothesis import given
from hypothesis import strategies as st

from mlxlora.utils.lazy import LazySequence

PLACES = st.none() | st.integers(-9, 9)


@frozen
class Squares(LazySequence[int]):
    size: int

    def __len__(self) -> int:
        return self.size

    def item(self, index: int) -> int:
        return index * index


@given(st.integers(0, 6), PLACES, PLACES, PLACES.filter(lambda step: step != 0))
def test_items_and_slices_are_those_of_a_list(count: int, start: int | None, stop: int | None, step: int | None) -> None:
    squares, listed = Squares(count), [i * i for i in range(count)]
    assert list(squares) == listed and squares[start:stop:step] == listed[start:stop:step]
    assert [squares[i] for i in range(-count, count)] == listed * 2
    with pytest.raises(IndexError):
        squares[count]
