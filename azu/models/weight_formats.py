"""Which tensors a stage holds as integers, and how many bytes they take. Pure, for the loader and the planner.

Weight-only quantisation: a linear layer's weight [out, in] is stored as small integers with a scale for each row (int8)
or for each 32 values of a row (int4, with a zero point), and multiplied with bfloat16 activations. All else stays
bfloat16: embeddings, the head (tied or not), norms, biases, routers, convolutions, and experts whose family stores
them transposed (GPT-OSS, Llama 4).
"""

from __future__ import annotations

from azu.wire.tensors import WeightFormat

__all__ = ["INT4_GROUP", "held_format", "integer_bytes", "is_packable", "is_router"]

# Values that share a scale and a zero point. Smaller is more exact: llama.cpp's Q4 formats have groups of 32, too.
INT4_GROUP = 32
# torch's kernels for packed integers on a CPU work on tiles of this many rows, and vectors of this many columns. They
# check the rows in one format and the columns in none: a width of 33 ends the process with a segmentation fault.
_ROWS, _COLUMNS = 16, 32
# What families call the linear layers that pick experts. A wrong pick costs more than its few bytes save, and some
# families read these weights without calling the module.
_ROUTERS = frozenset({"gate", "router", "shared_expert_gate"})


def is_router(name: str) -> bool:
    """Whether a module, by its dotted name, picks experts."""
    return not _ROUTERS.isdisjoint(name.split("."))


def is_packable(rows: int, columns: int) -> bool:
    """Whether torch's CPU kernels for packed integers take a weight of this shape."""
    return rows % _ROWS == 0 and columns % _COLUMNS == 0


def held_format(rows: int, columns: int, wanted: WeightFormat) -> WeightFormat:
    """The format in which a linear layer's weight [rows, columns] is held: int4 falls back to int8 on odd shapes."""
    return "int8" if wanted == "int4" and not is_packable(rows, columns) else wanted


def integer_bytes(rows: int, columns: int, wanted: WeightFormat) -> int:
    """Bytes of a linear layer's weight [rows, columns] in "int8" or "int4" on a CPU, scales and zero points included.

    On CUDA, int8 takes two bytes more for each row, and int4 weights are padded to a multiple of 1024 columns.
    """
    if held_format(rows, columns, wanted) == "int8":
        return rows * (columns + 3)  # a bfloat16 scale and an int8 zero point (always 0) for each row
    return rows * columns // 2 + rows * columns // INT4_GROUP * 4  # a bfloat16 scale and zero point for each group
