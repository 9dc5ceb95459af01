"""Parts of tensors whose axes may be joined from several: which places of each are wanted, through a change of shape.

An axis of N * 197 places, one for each token of N images, of which the first token of each is wanted, is two factors:
N of which all are wanted, and 197 of which the range from 0 to 1 is.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from cfcam_gpu.head_steps import Rows, Size


class Factor(NamedTuple):
    """An axis, or one of those that it was joined from: its size, and the range of it that is wanted."""

    size: Size
    start: int = 0
    length: int | None = None  # None: all

    @property
    def wanted(self) -> Size:
        return self.size if self.length is None else self.length


Axis = tuple[Factor, ...]
"""The outermost factor first; those of size 1 are left out."""

Box = tuple[Axis, ...]


class NotABox(ValueError):
    """What is wanted is no box, or the sizes do not tell."""


def product(sizes: Iterable[Size]) -> Size:
    """Raises `NotABox` for the square of the number of images."""
    number, n_rows = 1, 0
    for size in sizes:
        number *= size.factor if isinstance(size, Rows) else size
        n_rows += isinstance(size, Rows)
    if n_rows > 1:
        raise NotABox
    return Rows(number) if n_rows else number


def whole(sizes: Sequence[Size]) -> Box:
    """All of a tensor of these sizes."""
    return tuple(() if size == 1 else (Factor(size),) for size in sizes)


def is_whole(axis: Axis) -> bool:
    return all(factor.length is None for factor in axis)


def lengths(box: Box) -> list[Size]:
    """The shape of what is wanted."""
    return [product(factor.wanted for factor in axis) for axis in box]


def volume(box: Box) -> int:
    """Of an image, how many numbers are wanted."""
    sizes = (factor.wanted for axis in box for factor in axis)
    number = 1
    for size in sizes:
        number *= size.factor if isinstance(size, Rows) else size
    return number


def part(size: Size, start: int, length: int) -> Axis:
    """A range of an axis."""
    if isinstance(size, Rows):
        raise NotABox  # of the images themselves
    return () if size == 1 else _joined([Factor(size, start, length)])


def moved(axis: Axis, size: int, start: int) -> Axis:
    """Of a larger axis, what ``axis`` wants of the range that begins at ``start``."""
    if not axis:
        return part(size, start, 1)
    if len(axis) > 1 or isinstance(axis[0].wanted, Rows):
        raise NotABox
    return part(size, start + axis[0].start, axis[0].wanted)


def contains(one: Box, other: Box) -> bool:
    for pair in zip(one, other):
        factors = aligned(*pair)
        if factors is None:
            return False
        for large, small in zip(*factors):
            if large.length is None:
                continue
            if small.length is None or small.start < large.start:
                return False
            if small.start + small.length > large.start + large.length:
                return False
    return True


def hull(one: Box, other: Box) -> Box:
    """The smallest box around both."""
    axes = []
    for pair in zip(one, other):
        factors = aligned(*pair)
        axes.append(_joined(map(_around, *factors)) if factors else _joined([Factor(_size(pair[0]))]))
    return tuple(axes)


def merged(boxes: Sequence[Box], everything: Box) -> list[Box]:
    """Boxes around these, none of them in another: those that overlap as one where that is less to compute, and small
    ones that touch, which take as long apart. Large ones that touch stay as they are, or they would be copied apart."""
    small = volume(everything) / 4
    found: list[Box] = []
    for box in boxes:
        while box is not None:
            for index, other in enumerate(found):
                around = hull(box, other)
                larger = volume(around) - volume(box) - volume(other)
                if larger < 0 or (larger == 0 and volume(around) <= small):
                    box = around
                    del found[index]
                    break
            else:
                found.append(box)
                break
    return found if sum(map(volume, found)) < volume(everything) else [everything]


def aligned(one: Axis, other: Axis) -> tuple[Axis, Axis] | None:
    """The same axis twice, in factors of the same sizes; None where they are cut in other ways."""
    if [factor.size for factor in one] == [factor.size for factor in other]:
        return one, other
    if is_whole(one):
        return tuple(Factor(factor.size) for factor in other), other
    if is_whole(other):
        return one, tuple(Factor(factor.size) for factor in one)
    return None


def reshaped(box: Box, sizes: Sequence[Size]) -> Box:
    """The same numbers of the tensor in another shape."""
    left = [factor for axis in box for factor in axis]
    axes = []
    for size in reversed(sizes):
        axis: list[Factor] = []
        while size != 1:
            if not left:
                raise NotABox
            factor = left.pop()
            rest = _quotient(size, factor.size)
            if rest is None:
                outer, factor = _split(factor, size)
                left.append(outer)
                rest = 1
            axis.insert(0, factor)
            size = rest
        axes.append(_joined(axis))
    if left:
        raise NotABox
    return tuple(reversed(axes))


def _split(factor, size):
    """The factor as an outer and an inner one, of ``size``."""
    outer = _quotient(factor.size, size)
    if outer is None:
        raise NotABox
    if factor.length is None:
        return Factor(outer), Factor(size)
    first, last = factor.start // size, (factor.start + factor.length - 1) // size
    if factor.start % size == factor.length % size == 0:
        return Factor(outer, first, last - first + 1), Factor(size)
    if first == last:
        return Factor(outer, first, 1), Factor(size, factor.start % size, factor.length)
    raise NotABox


def _joined(factors):
    """The axis of these factors, in as few as it can be."""
    axis: list[Factor] = []
    for factor in factors:
        if factor.size == 1:
            continue
        if factor.length == factor.size:
            factor = Factor(factor.size)
        if axis:
            outer = axis[-1]
            if outer.length is None and factor.length is None:
                sizes = (outer.size, factor.size)
                if not all(isinstance(size, Rows) for size in sizes):
                    axis[-1] = Factor(product(sizes))
                    continue
            elif isinstance(outer.size, int) and isinstance(factor.size, int):
                if factor.length is None:
                    start, length = outer.start * factor.size, outer.length * factor.size
                    axis[-1] = Factor(outer.size * factor.size, start, length)
                    continue
                if outer.length == 1:
                    start = outer.start * factor.size + factor.start
                    axis[-1] = Factor(outer.size * factor.size, start, factor.length)
                    continue
        axis.append(factor)
    return tuple(axis)


def _around(one, other):
    if one.length is None or other.length is None:
        return Factor(one.size)
    start = min(one.start, other.start)
    return Factor(one.size, start, max(one.start + one.length, other.start + other.length) - start)


def _size(axis):
    return product(factor.size for factor in axis)


def _quotient(one, other):
    """one / other; None where that is no whole number or multiple of the images."""
    n_rows = isinstance(one, Rows) - isinstance(other, Rows)
    of_one, of_other = (size.factor if isinstance(size, Rows) else size for size in (one, other))
    if n_rows < 0 or of_one % of_other:
        return None
    return Rows(of_one // of_other) if n_rows else of_one // of_other
