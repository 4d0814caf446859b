"""GPT-2's byte-level alphabet: each byte of UTF-8 as one printable character."""

from __future__ import annotations


def _byte_of_char() -> dict[str, int]:
    """Printable bytes stand for themselves, others for U+0100 onwards."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTE_OF_CHAR = _byte_of_char()
