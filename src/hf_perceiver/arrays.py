"""Input arrays (B, M, C) and output queries (B, O, E) as their parts, dense on demand.

A part is what one modality contributes: features, a position code, constant channels. Kept apart, they cost a fraction
of the dense array, and attention over them has cheaper exact forms; `dense()` is the array itself.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .position_encoding import Code, Grid, take_rows


@dataclass
class ArrayPart:
    """Elements of one modality: [features ; position ; constant], (1 or B, M, C) when dense.

    features (1 or B, M, F) or None; position a code or None; combine "concat" or "add" them; constant (P,) trained
    padding; mask (B, M) bool, True = valid, None = all; token (C,) stands in for elements where `replaced` (B, M) is True.
    grid is the layout of M, None for a set.
    """

    features: Tensor | None = None
    position: Code | None = None
    combine: str = "concat"
    constant: Tensor | None = None
    mask: Tensor | None = None
    token: Tensor | None = None
    replaced: Tensor | None = None
    grid: Grid | None = None

    @property
    def length(self) -> int:
        if self.features is not None:
            return self.features.shape[1]
        if self.position is not None:
            return self.position.length
        return 1 if self.replaced is None else self.replaced.shape[1]

    @property
    def batch_size(self) -> int:
        sizes = [t.shape[0] for t in (self.features, self.mask, self.replaced) if t is not None]
        sizes.append(1 if self.position is None else self.position.batch_size)
        return 0 if 0 in sizes else max(sizes)

    def dense(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows start to stop: (1 or B, stop - start, C)"""
        stop = self.length if stop is None else min(stop, self.length)
        columns = []
        if self.features is not None:
            columns.append(self.features[:, start:stop])
        if self.position is not None:
            position = self.position.dense(start, stop)
            columns.append(position if not columns else position.to(columns[0].dtype))
        if not columns and self.token is not None:
            return self.token[None, None].expand(1, stop - start, -1)
        if self.combine == "add" and len(columns) == 2:
            columns = [columns[0] + columns[1]]
        if self.constant is not None and self.constant.numel():
            columns.append(self.constant[None, None].expand(1, stop - start, -1).to(columns[0].dtype))
        batch = next((column.shape[0] for column in columns if column.shape[0] != 1), 1)
        rows = torch.cat([c.expand(batch, -1, -1) for c in columns], dim=-1) if len(columns) > 1 else columns[0]
        if self.replaced is not None and self.token is not None:
            rows = torch.where(self.replaced[:, start:stop, None], self.token.to(rows.dtype), rows)
        return rows

    def select(self, points: Tensor) -> "ArrayPart":
        """The elements at flat indices (n,) or (B, n); the grid is gone."""
        return replace(
            self,
            features=None if self.features is None else take_rows(self.features, points),
            position=None if self.position is None else self.position.select(points),
            mask=None if self.mask is None else take_rows(self.mask[..., None], points)[..., 0],
            replaced=None if self.replaced is None else take_rows(self.replaced[..., None], points)[..., 0],
            grid=None,
        )


@dataclass
class PerceiverArray:
    """Parts by modality name, in their order in the array. One nameless part: `{"": part}`."""

    parts: dict[str, ArrayPart]

    def __iter__(self) -> Iterator[tuple[str, ArrayPart]]:
        return iter(self.parts.items())

    @classmethod
    def of(cls, array: "PerceiverArray | ArrayPart | Tensor") -> "PerceiverArray":
        """A part of its own, for modules that return a plain (B, M, C) tensor or one part."""
        if isinstance(array, Tensor):
            if array.ndim != 3:
                raise ValueError(f"an array is (B, M, C), not {tuple(array.shape)}")
            array = ArrayPart(features=array)
        return cls({"": array}) if isinstance(array, ArrayPart) else array

    @property
    def part(self) -> ArrayPart:
        """The only part; ValueError where there are several."""
        if len(self.parts) != 1:
            raise ValueError(f"this part of the model reads one modality; the array has {', '.join(self.parts)}")
        return next(iter(self.parts.values()))

    @property
    def sizes(self) -> dict[str, int]:
        return {name: part.length for name, part in self}

    @property
    def length(self) -> int:
        return sum(self.sizes.values())

    @property
    def batch_size(self) -> int:
        return max(part.batch_size for _, part in self)

    @property
    def like(self) -> Tensor:
        """(1 or B, 1, C), an element of the array, for its device and dtype."""
        return next(iter(self.parts.values())).dense(0, 1)

    def dense(self) -> Tensor:
        """(B, M, C), modalities in order."""
        rows = [part.dense() for _, part in self]
        if len(rows) == 1:
            return rows[0]
        return torch.cat([r.expand(self.batch_size, -1, -1) for r in rows], dim=1)

    def mask(self) -> Tensor | None:
        """(B, M) bool, True = valid; None when everything is."""
        if all(part.mask is None for _, part in self):
            return None
        batch = self.batch_size
        columns = []
        for _, part in self:
            if part.mask is not None:
                columns.append(part.mask.expand(batch, -1))
            else:
                device = next(p.mask.device for _, p in self if p.mask is not None)
                columns.append(torch.ones(batch, part.length, dtype=torch.bool, device=device))
        return torch.cat(columns, dim=1)


class InputArray(PerceiverArray):
    """What the encoder reads, (B, M, C)."""


class QueryArray(PerceiverArray):
    """What the decoder is asked, (B, O, E)."""
