"""Which blocks of the paged KV cache are in use, and which hold a prefix that can be used again.

Paged attention: Kwon et al. 2023. A full block is known by a hash over its own tokens, those before it and
the adapter mix they ran with, so that equal prefixes under one mix share blocks, and nothing else does.
"""

from __future__ import annotations

import hashlib
import struct
from collections import OrderedDict, abc

from server.scheduling.sequence import MixKey, Tokens

_HASH_BYTES = 32  # wrong K and V would be served on a collision, so collisions must be out of reach


def root_hash(mix: MixKey, tenant: str = "", salt: str = "") -> bytes:
    """Parent hash of a sequence's first block: K and V depend on the adapters' content and weights, and what
    one tenant has asked, or one client of it with a salt, is not to show in another's answers."""
    digest = hashlib.blake2b(digest_size=_HASH_BYTES)
    for name, weight in ((tenant, 0.0), (salt, 0.0), *mix):
        encoded = name.encode()
        digest.update(struct.pack("<qd", len(encoded), weight) + encoded)
    return digest.digest()


def extend_hashes(hashes: list[bytes], tokens: Tokens, root: bytes, block_size: int) -> None:
    """Append to `hashes`, which covers the first blocks of `tokens`, the hash of each further full block.
    `root`: see `root_hash`."""
    parent = hashes[-1] if hashes else root
    for start in range(len(hashes) * block_size, len(tokens) - block_size + 1, block_size):
        content = parent + tokens[start : start + block_size].tobytes()
        parent = hashlib.blake2b(content, digest_size=_HASH_BYTES).digest()
        hashes.append(parent)


class BlockPool:
    """Blocks 0 .. num_blocks - 1, each in one of three states.

    free: holds nothing of use. held: sequences refer to it. cached: no sequence does, but its content is
    kept for prefix reuse until the room is needed; the least recently used goes first.
    free + cached + held == num_blocks at all times.
    """

    def __init__(self, num_blocks: int, block_size: int, prefix_caching: bool = True) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"a pool of {num_blocks} blocks of {block_size} tokens holds nothing")
        self.num_blocks = num_blocks
        self.block_size = block_size  # tokens
        self.prefix_caching = prefix_caching
        self._references = [0] * num_blocks
        self._hashes: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}
        self._free = list(range(num_blocks - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def cached(self) -> int:
        return len(self._cached)

    @property
    def held(self) -> int:
        return self.num_blocks - self.free - self.cached

    @property
    def available(self) -> int:
        """How many blocks `allocate` can give: free and cached ones."""
        return len(self._free) + len(self._cached)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def allocate(self, count: int) -> list[int]:
        """`count` blocks with one reference each. Raises RuntimeError when `available` is less."""
        if count > self.available:
            raise RuntimeError(f"{count} blocks wanted, {self.available} available")
        blocks = []
        for _ in range(count):
            block = self._free.pop() if self._free else self._evict()
            self._references[block] = 1
            blocks.append(block)
        return blocks

    def _evict(self) -> int:
        block, _ = self._cached.popitem(last=False)
        content = self._hashes[block]
        if content is not None:
            del self._block_of[content]
            self._hashes[block] = None
        return block

    def share(self, blocks: abc.Sequence[int]) -> None:
        """Take one more reference to each of these held blocks. Raises ValueError on one that is not held."""
        for block in blocks:
            if self._references[block] == 0:
                raise ValueError(f"block {block} is not held")
            self._references[block] += 1

    def release(self, blocks: abc.Sequence[int]) -> None:
        """Give back one reference to each block of a sequence, named from its first on.

        The last ones become evictable first: a prefix is of use without its tail, never the other way
        round. Raises ValueError on a block that nobody holds.
        """
        for block in reversed(blocks):
            if self._references[block] == 0:
                raise ValueError(f"block {block} is not held")
            self._references[block] -= 1
            if self._references[block] == 0:
                if self._hashes[block] is None:
                    self._free.append(block)
                else:
                    self._cached[block] = None

    def register(self, block: int, content: bytes) -> None:
        """Offer a held, full, computed block for reuse under the hash of its content.

        The first block with that content wins; a second one stays its sequence's own.
        """
        if self._references[block] == 0:
            raise ValueError(f"block {block} is not held")
        if self.prefix_caching and self._hashes[block] is None and content not in self._block_of:
            self._hashes[block] = content
            self._block_of[content] = block

    def match_prefix(self, hashes: abc.Sequence[bytes]) -> list[int]:
        """The longest run of known blocks from the first hash on, with one reference taken to each."""
        blocks: list[int] = []
        for content in hashes:
            block = self._block_of.get(content)
            if block is None:
                break
            if self._references[block] == 0:
                del self._cached[block]
            self._references[block] += 1
            blocks.append(block)
        return blocks
