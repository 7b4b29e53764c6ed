"""Which blocks hold which prefixes of tokens: a chain of hashes, and a radix tree, behind one interface. No JAX here."""

import dataclasses
import hashlib
import struct
from collections.abc import Iterator, Sequence
from typing import Protocol, runtime_checkable

type Part = tuple[int, ...]
"""The tokens of one block."""


def namespace(**fields: str | int) -> bytes:
    """The digest of named fields, such as a model's fingerprint, a cache's spec and a tenant's salt: prefixes of two namespaces never meet.

    Each name and value is preceded by its length and a value's type, so that no two sets of fields read alike.
    """
    digest = hashlib.sha256(b"namespace")
    for name, value in sorted(fields.items()):
        for part in (name, type(value).__name__, str(value)):
            digest.update(struct.pack("<q", len(part.encode())) + part.encode())
    return digest.digest()


def parts(tokens: Sequence[int], size: int) -> Iterator[Part]:
    """The tokens of each full block."""
    for start in range(0, len(tokens) - len(tokens) % size, size):
        yield tuple(tokens[start : start + size])


@runtime_checkable
class Index(Protocol):
    """Full blocks by the tokens in and before them: a block is found only behind those before it, so what is behind one goes first."""

    def match(self, space: bytes, tokens: Sequence[int]) -> list[int]:
        """The blocks of the longest prefix that is there, of whole blocks."""
        ...

    def insert(self, space: bytes, before: int | None, part: Part, block: int) -> int | None:
        """Say that a block holds a part behind another block, or at the start; return the block that holds it, the first that was said.

        None, and nothing is said, if it could be mistaken for another. KeyError if the block before it is not there.
        """
        ...

    def remove(self, block: int) -> int | None:
        """Forget a block that nothing is behind; return the one before it. ValueError if something is."""
        ...

    def last(self, block: int) -> bool:
        """Whether nothing is behind a block."""
        ...

    def __contains__(self, block: int) -> bool: ...


def key(before: bytes, part: Part) -> bytes:
    """What names a block's content: SHA-256 over the name of what is before it, at the start the namespace, and its tokens."""
    return hashlib.sha256(before + struct.pack(f"<{len(part)}q", *part)).digest()


@dataclasses.dataclass
class Link:
    """One block of a chain of hashes."""

    space: bytes
    key: bytes
    before: int | None
    part: Part
    behind: int = 0
    """How many blocks are right behind it."""


class HashChain:
    """One hash for each block over all before it (vLLM's prefix caching); tokens are compared all the same, so equal hashes do no harm."""

    def __init__(self, size: int):
        self.size = size
        self._links: dict[int, Link] = {}
        self._blocks: dict[bytes, int] = {}

    def match(self, space, tokens):
        """See `Index`."""
        found: list[int] = []
        name, before = space, None
        for part in parts(tokens, self.size):
            name = key(name, part)
            block = self._found(space, name, before, part)
            if block is None:
                break
            found.append(block)
            before = block
        return found

    def _found(self, space: bytes, name: bytes, before: int | None, part: Part) -> int | None:
        block = self._blocks.get(name)
        link = None if block is None else self._links[block]
        return block if link and (link.space, link.before, link.part) == (space, before, part) else None

    def insert(self, space, before, part, block):
        """See `Index`."""
        name = key(space if before is None else self._links[before].key, part)
        if name in self._blocks:
            return self._found(space, name, before, part)
        self._blocks[name] = block
        self._links[block] = Link(space, name, before, part)
        if before is not None:
            self._links[before].behind += 1
        return block

    def remove(self, block):
        """See `Index`."""
        if not self.last(block):
            raise ValueError(f"there is something behind block {block}")
        link = self._links.pop(block)
        del self._blocks[link.key]
        if link.before is not None:
            self._links[link.before].behind -= 1
        return link.before

    def last(self, block):
        """See `Index`."""
        return not self._links[block].behind

    def __contains__(self, block):
        return block in self._links

    def __len__(self):
        return len(self._links)


@dataclasses.dataclass(eq=False)
class Node:
    """A run of blocks that nothing branches off between; a root's is empty."""

    above: "Node | None"
    blocks: list[int]
    parts: list[Part]
    below: dict[Part, "Node"] = dataclasses.field(default_factory=dict)
    """By the first part of each."""


class Radix:
    """A tree in which a node holds all blocks up to where prefixes part (SGLang's RadixAttention, Zheng et al. 2024, §3)."""

    def __init__(self, size: int):
        self.size = size
        self._roots: dict[bytes, Node] = {}
        self._node: dict[int, Node] = {}
        self._space: dict[Node, bytes] = {}

    def match(self, space, tokens):
        """See `Index`."""
        found: list[int] = []
        node, place = self._roots.get(space), 0
        for part in parts(tokens, self.size):
            if node is not None and place == len(node.blocks):
                node, place = node.below.get(part), 0
            if node is None or node.parts[place] != part:
                break
            found.append(node.blocks[place])
            place += 1
        return found

    def insert(self, space, before, part, block):
        """See `Index`."""
        if before is None:
            if space not in self._roots:
                self._roots[space] = Node(None, [], [])
                self._space[self._roots[space]] = space
            node = self._roots[space]
            place = 0
        else:
            node = self._node[before]
            place = node.blocks.index(before) + 1
        if place < len(node.blocks):
            if node.parts[place] == part:
                return node.blocks[place]
            self._split(node, place)
        if part in node.below:
            return node.below[part].blocks[0]
        if node.above is None or node.below:
            node.below[part] = node = Node(node, [], [])
        node.blocks.append(block)
        node.parts.append(part)
        self._node[block] = node
        return block

    def _split(self, node: Node, place: int) -> None:
        """Make what a node holds from a place on the one node below it."""
        rest = Node(node, node.blocks[place:], node.parts[place:], node.below)
        for each in rest.below.values():
            each.above = rest
        self._node |= dict.fromkeys(rest.blocks, rest)
        node.blocks, node.parts, node.below = node.blocks[:place], node.parts[:place], {rest.parts[0]: rest}

    def remove(self, block):
        """See `Index`."""
        if not self.last(block):
            raise ValueError(f"there is something behind block {block}")
        node = self._node.pop(block)
        above = node.above
        assert above is not None  # a root has no blocks
        node.blocks.pop()
        part = node.parts.pop()
        if node.blocks:
            return node.blocks[-1]
        del above.below[part]
        if above.above is None:
            if not above.below:
                del self._roots[self._space.pop(above)]
            return None
        if len(above.below) == 1:  # nothing branches off any more
            (rest,) = above.below.values()
            above.blocks, above.parts, above.below = above.blocks + rest.blocks, above.parts + rest.parts, rest.below
            for each in rest.below.values():
                each.above = above
            self._node |= dict.fromkeys(rest.blocks, above)
            return above.blocks[-1 - len(rest.blocks)]
        return above.blocks[-1]

    def last(self, block):
        """See `Index`."""
        node = self._node[block]
        return node.blocks[-1] == block and not node.below

    def __contains__(self, block):
        return block in self._node

    def __len__(self):
        return len(self._node)
