"""Who owns which KV block, and which blocks can be used again. Knows block numbers and keys, no tensors."""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence

BlockKey = bytes
"""What a full block holds: everything that its K and V were computed from, hashed."""


class BooksError(AssertionError):
    """The engine's own accounts disagree: a bug in the engine, never a user's doing."""


def root_key(*, salt: str, adapters: Iterable[tuple[str, float]]) -> BlockKey:
    """The parent of a sequence's first block: K and V are shared only by the same tenant and the same adapters."""
    digest = hashlib.blake2b(digest_size=32, person=b"loractl-kv-root")
    digest.update(len(salt.encode()).to_bytes(8, "little") + salt.encode())
    for name, weight in adapters:
        digest.update(f"\n{name} {weight!r}".encode())
    return digest.digest()


def child_key(parent: BlockKey, tokens: Sequence[int]) -> BlockKey:
    """The key of the block that follows `parent` and holds `tokens`."""
    digest = hashlib.blake2b(parent, digest_size=32, person=b"loractl-kv-next")
    digest.update(array("q", tokens).tobytes())
    return digest.digest()


class BlockPool:
    """A fixed number of blocks, each free, held by one or more sequences, or kept for its content.

    A block whose last holder lets go keeps its content, if it has a key, until room is needed: oldest first.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._blank = list(range(num_blocks - 1, -1, -1))
        self._kept: OrderedDict[int, None] = OrderedDict()
        self._holders = [0] * num_blocks
        self._key_of: dict[int, BlockKey] = {}
        self._block_of: dict[BlockKey, int] = {}

    @property
    def num_free(self) -> int:
        """Blocks that `take` can give, kept ones included."""
        return len(self._blank) + len(self._kept)

    @property
    def num_kept(self) -> int:
        """Free blocks whose content can still be found."""
        return len(self._kept)

    @property
    def num_held(self) -> int:
        """Blocks that sequences hold."""
        return self.num_blocks - self.num_free

    def take(self, num_blocks: int) -> list[int]:
        """Hold blocks with no content; ask `num_free` first."""
        taken = []
        for _ in range(num_blocks):
            block = self._blank.pop() if self._blank else self._forget_oldest()
            self._holders[block] = 1
            taken.append(block)
        return taken

    def find(self, keys: Iterable[BlockKey]) -> list[int]:
        """The blocks of the longest run of `keys` from the start; holds nothing."""
        found: list[int] = []
        for key in keys:
            block = self._block_of.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def share(self, blocks: Iterable[int]) -> None:
        """Hold blocks that `find` gave."""
        for block in blocks:
            if self._holders[block] == 0:
                del self._kept[block]
            self._holders[block] += 1

    def num_kept_of(self, blocks: Iterable[int]) -> int:
        """How many of these blocks count as free until they are shared."""
        return sum(self._holders[block] == 0 for block in blocks)

    def publish(self, block: int, key: BlockKey) -> None:
        """Say what a held block contains, so that others find it; the first block of a key stays the one found."""
        if key not in self._block_of and block not in self._key_of:
            self._key_of[block] = key
            self._block_of[key] = block

    def withdraw(self, blocks: Iterable[int]) -> None:
        """Let nobody find these held blocks: what they contain is not to be trusted."""
        for block in blocks:
            if (key := self._key_of.pop(block, None)) is not None:
                del self._block_of[key]

    def give_back(self, blocks: Iterable[int]) -> None:
        """Let go of blocks, the last of a sequence first to be forgotten."""
        for block in reversed(list(blocks)):
            self._holders[block] -= 1
            if self._holders[block] == 0:
                if block in self._key_of:
                    self._kept[block] = None
                else:
                    self._blank.append(block)

    def forget_all(self) -> None:
        """Drop the content of every block that nobody holds."""
        while self._kept:
            self._blank.append(self._forget_oldest())

    def check(self, held: Iterable[int]) -> None:
        """Raise BooksError unless the blocks in `held`, with repeats, are exactly those that are held."""
        counts = [0] * self.num_blocks
        for block in held:
            counts[block] += 1
        if counts != self._holders:
            wrong = [b for b in range(self.num_blocks) if counts[b] != self._holders[b]]
            raise BooksError(f"blocks {wrong[:8]} are held {[counts[b] for b in wrong[:8]]} times, not as booked")
        free = [*self._blank, *self._kept]
        if len(set(free)) != len(free) or any(counts[block] for block in free):
            raise BooksError("a block is free twice, or free and held")
        if len(free) + sum(count > 0 for count in counts) != self.num_blocks:
            raise BooksError(f"{len(free)} free blocks and {self.num_held} held are not {self.num_blocks}")
        if {block: key for key, block in self._block_of.items()} != self._key_of:
            raise BooksError("block keys and their index disagree")

    def _forget_oldest(self) -> int:
        block, _ = self._kept.popitem(last=False)
        del self._block_of[self._key_of.pop(block)]
        return block
