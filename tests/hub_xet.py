"""The Xet store of the test Hub: uploaded xorbs, and the shards that list the chunks of each file."""

import struct
from dataclasses import dataclass, field
from typing import Any

CHUNK_HEADER = 8
RECORD = 48  # each record of a shard has a 32-byte hash and 16 bytes of numbers
SHARD_HEADER = 48
HAS_VERIFICATION, HAS_METADATA = 1 << 31, 1 << 30
LAST_RECORD = b"\xff" * 32


class XetError(ValueError):
    """The uploaded content cannot be stored."""


@dataclass
class Xorb:
    """A sequence of chunks, each after its header."""

    data: bytearray
    starts: list[int]  # offset of each chunk's header, and of the end

    @classmethod
    def parse(cls, body: bytes) -> "Xorb":
        starts = [0]
        while starts[-1] < len(body):
            start = starts[-1]
            stored, scheme = int.from_bytes(body[start + 1 : start + 4], "little"), body[start + 4]
            if scheme:
                raise XetError("compressed chunk: run the client with HF_XET_XORB_COMPRESSION_POLICY=none")
            starts.append(start + CHUNK_HEADER + stored)
        if starts[-1] != len(body):
            raise XetError("the last chunk of the xorb is cut")
        return cls(bytearray(body), starts)

    def unpacked(self, first: int, last: int) -> bytes:
        chunks = zip(self.starts[first:last], self.starts[first + 1 : last + 1], strict=True)
        return b"".join(bytes(self.data[start + CHUNK_HEADER : end]) for start, end in chunks)


@dataclass(frozen=True)
class Term:
    """A range of consecutive chunks of one xorb."""

    xorb: str
    length: int
    first: int
    last: int


@dataclass
class XetStore:
    """All content uploaded to the content-addressed store."""

    xorbs: dict[str, Xorb] = field(default_factory=dict)
    files: dict[str, list[Term]] = field(default_factory=dict)
    by_sha256: dict[str, str] = field(default_factory=dict)

    def add_xorb(self, name: str, body: bytes) -> bool:
        new = name not in self.xorbs
        self.xorbs.setdefault(name, Xorb.parse(body))
        return new

    def add_shard(self, body: bytes) -> None:
        """Register the files of a shard; the data after its file section only repeats the xorbs and is ignored."""
        position = SHARD_HEADER
        while body[position : position + 32] != LAST_RECORD:
            name, (flags, count) = _hash_at(body, position), struct.unpack_from("<2I", body, position + 32)
            records = range(position + RECORD, position + RECORD * (1 + count), RECORD)
            terms = [_term_at(body, record) for record in records]
            if unknown := [term.xorb for term in terms if term.xorb not in self.xorbs]:
                raise XetError(f"shard of xorbs that were never uploaded: {unknown}")
            self.files[name] = terms
            position += RECORD * (1 + count * (2 if flags & HAS_VERIFICATION else 1))
            if flags & HAS_METADATA:
                self.by_sha256[_hash_at(body, position)] = name
                position += RECORD

    def content(self, sha256: str) -> bytes:
        terms = self.files[self.by_sha256[sha256]]
        return b"".join(self.xorbs[term.xorb].unpacked(term.first, term.last) for term in terms)

    def reconstruction(self, name: str, start: int, end: int | None, base_url: str) -> dict[str, Any] | None:
        """Return how to fetch bytes start..end (inclusive) of a file, or None if start is past its end."""
        terms, skipped, position = [], 0, 0
        for term in self.files[name]:
            if position + term.length <= start:
                skipped = position + term.length
            elif end is None or position <= end:
                terms.append(term)
            position += term.length
        if start >= position:
            return None
        fetch: dict[str, list[dict[str, Any]]] = {}
        for term in dict.fromkeys(terms):
            starts = self.xorbs[term.xorb].starts
            part = {"range": {"start": term.first, "end": term.last}, "url": f"{base_url}/xorb/{term.xorb}"}
            part["url_range"] = {"start": starts[term.first], "end": starts[term.last] - 1}
            fetch.setdefault(term.xorb, []).append(part)
        listed = [{"hash": t.xorb, "unpacked_length": t.length, "range": {"start": t.first, "end": t.last}} for t in terms]
        return {"offset_into_first_range": start - skipped, "terms": listed, "fetch_info": fetch}

    def corrupt(self, sha256: str) -> None:
        """Flip one bit in the middle of the file's middle chunk."""
        terms = self.files[self.by_sha256[sha256]]
        term = terms[len(terms) // 2]
        xorb, chunk = self.xorbs[term.xorb], (term.first + term.last - 1) // 2
        start, end = xorb.starts[chunk] + CHUNK_HEADER, xorb.starts[chunk + 1]
        xorb.data[(start + end) // 2] ^= 1


def _hash_at(body: bytes, position: int) -> str:
    """Return a hash as Xet prints it: four little-endian 64-bit numbers. A stored SHA-256 then prints as usual."""
    return "".join(f"{number:016x}" for number in struct.unpack_from("<4Q", body, position))


def _term_at(body: bytes, position: int) -> Term:
    _, length, first, last = struct.unpack_from("<4I", body, position + 32)
    return Term(_hash_at(body, position), length, first, last)
