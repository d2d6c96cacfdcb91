"""Seeds that are the same on every machine and Python version."""

import hashlib


def derived_seed(*parts: object) -> int:
    """Derive a 63-bit seed from named parts: the first bytes of their SHA-256."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
