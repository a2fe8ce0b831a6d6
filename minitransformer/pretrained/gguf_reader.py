"""The reader of the package `gguf`, which needs to be installed, with arrays of numbers read at once."""

from __future__ import annotations

from typing import Any

import numpy as np
from gguf import GGUFReader, GGUFValueType


class ArrayReader(GGUFReader):
    """A GGUF file, whose scores and maps of characters are not read number by number."""

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> tuple[int, list[Any], list[int], list[Any]]:
        """The size of a value, its parts, which of these are the value itself, and their types."""
        if GGUFValueType(raw_type) == GGUFValueType.ARRAY:
            item, count = self._get(orig_offs, np.uint32), self._get(orig_offs + 4, np.uint64)
            types = [GGUFValueType.ARRAY, GGUFValueType(item[0])]
            if (number := self.gguf_scalar_to_np.get(types[1])) is not None:
                values = self._get(orig_offs + 12, number, int(count[0]))
                if len(values) < count[0]:
                    raise ValueError("an array is cut short")
                return 12 + values.nbytes, [item, count, values], [2], types
        found: tuple[int, list[Any], list[int], list[Any]] = super()._get_field_parts(orig_offs, raw_type)
        return found
