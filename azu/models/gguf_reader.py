"""gguf's own reader with bounds: it takes lengths as the file says them, and reads past the end without noticing.

An array that claims 2**60 numbers would then grow a list until the memory is full, and one of a few million bytes
takes some hundred times its size.
"""

from __future__ import annotations

from typing import Any, Literal

import gguf
import numpy as np
import numpy.typing as npt

__all__ = ["BoundedReader"]

# In all arrays of a file together; each costs about 400 bytes. The largest vocabulary has 262,144 tokens with a text,
# a score and a type each, and half a million merges.
MAX_ARRAY_ITEMS = 4_000_000


class BoundedReader(gguf.GGUFReader):
    """A GGUF file whose every length was held against the file's size.

    Raises:
        ValueError: a length does not fit the file or the bound. Other damage comes as gguf's reader happens to fail.
    """

    def __init__(self, path: Any) -> None:
        self._items_left = MAX_ARRAY_ITEMS
        super().__init__(path)
        # Tensors that overlap would be stored several times over.
        if sum(tensor.n_bytes for tensor in self.tensors) > len(self.data):
            raise ValueError("its tensors are larger than the file")

    def _get(
        self,
        offset: int,
        dtype: npt.DTypeLike,
        count: int = 1,
        override_order: Literal["I", "S", "<"] | None = None,
    ) -> npt.NDArray[Any]:
        size = int(count) * np.dtype(dtype).itemsize
        if int(offset) + size > len(self.data):
            raise ValueError("it is cut off, or claims more than it holds")
        return super()._get(offset, dtype, count, override_order)

    def _get_field_parts(
        self, orig_offs: int, raw_type: int
    ) -> tuple[int, list[npt.NDArray[Any]], list[int], list[gguf.GGUFValueType]]:
        if raw_type == gguf.GGUFValueType.ARRAY:
            if self._get(orig_offs, np.uint32)[0] == gguf.GGUFValueType.ARRAY:
                raise ValueError("it nests arrays")
            self._items_left -= int(self._get(orig_offs + 4, np.uint64)[0])
            if self._items_left < 0:
                raise ValueError(f"its arrays have more than {MAX_ARRAY_ITEMS} items")
        return super()._get_field_parts(orig_offs, raw_type)
