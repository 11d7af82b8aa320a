"""Hostile GGUF files: each is refused at once, whatever lengths it claims."""

from __future__ import annotations

import re
import resource
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from azu.errors import ModelError
from azu.models import gguf_reader
from azu.models.gguf_source import open_gguf

HEAD = b"GGUF" + struct.pack("<I", 3)
U8, U32, STRING, ARRAY = 0, 4, 8, 9
F32 = 0


@pytest.fixture(autouse=True)
def _little_memory() -> Iterator[None]:
    """So that a parser which believes the file fails here and not the machine."""
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    (used,) = re.findall(r"^VmData:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    resource.setrlimit(resource.RLIMIT_DATA, ((int(used) << 10) + (1 << 30), hard))
    yield
    resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def field(name: bytes, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def array(kind: int, length: int, items: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, length) + items


def tensor(name: bytes, *shape: int, kind: int = F32, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def whole(*fields: bytes, tensors: tuple[bytes, ...] = (), data: bytes = b"", n_tensors: int | None = None) -> bytes:
    count = len(tensors) if n_tensors is None else n_tensors
    head = HEAD + struct.pack("<QQ", count, len(fields)) + b"".join(fields + tensors)
    return head + bytes(-len(head) % 32) + data


LLAMA = field(b"general.architecture", STRING, text(b"llama"))


def meta(name: str, value: int) -> bytes:
    return field(f"llama.{name}".encode(), U32, struct.pack("<I", value))


@pytest.mark.parametrize(
    "content",
    [
        whole(field(b"a", ARRAY, array(U8, 2**60))),
        whole(field(b"a", ARRAY, array(STRING, 2**60))),
        whole(field(b"a", ARRAY, array(ARRAY, 1) * 5_000)),
        whole(field(b"a", STRING, struct.pack("<Q", 2**63))),
        whole(LLAMA, n_tensors=2**63),
        whole(tensors=(tensor(b"output.weight", 2**40),), data=bytes(64)),
        whole(tensors=(tensor(b"output.weight", 2**32, 2**32),), data=bytes(64)),
        whole(tensors=(text(b"output.weight") + struct.pack("<I", 2**31),)),
        whole(tensors=(tensor(b"output.weight", 4, offset=2**63),), data=bytes(64)),
        whole(LLAMA, meta("attention.head_count", 0), meta("attention.head_count_kv", 0)),
        whole(LLAMA, field(b"llama.attention.head_count", STRING, text(b"many"))),
        whole(LLAMA, field(b"llama.attention.head_count", ARRAY, array(U32, 2, bytes(8)))),
    ],
)
def test_lengths_that_lie(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "hostile.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelError) as caught, open_gguf(path):
        pass
    assert caught.value.code == "bad_gguf"


def test_the_items_of_all_arrays_count_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_reader, "MAX_ARRAY_ITEMS", 10)
    path = tmp_path / "many.gguf"
    path.write_bytes(whole(*(field(name, ARRAY, array(U8, 5, bytes(5))) for name in (b"a", b"b"))))
    assert {"a", "b"} <= set(gguf_reader.BoundedReader(path).fields)
    path.write_bytes(whole(*(field(name, ARRAY, array(U8, 5, bytes(5))) for name in (b"a", b"b", b"c"))))
    with pytest.raises(ValueError, match="more than 10 items"):
        gguf_reader.BoundedReader(path)


def test_tensors_that_share_their_bytes(tmp_path: Path) -> None:
    path = tmp_path / "overlapping.gguf"
    names = [f"blk.{index}.attn_norm.weight".encode() for index in range(50)]
    path.write_bytes(whole(tensors=tuple(tensor(name, 1024) for name in names), data=bytes(4096)))
    with pytest.raises(ValueError, match="larger than the file"):
        gguf_reader.BoundedReader(path)
