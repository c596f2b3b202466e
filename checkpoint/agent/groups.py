"""Groups of nodes: above a thousand ranks parts join a group first, so that nobody reads or lists what all wrote.

Of N nodes a group is about the square root, consecutive ones. One of a group, another one each step, makes the group's
part of its nodes' parts as they come (``manifest.join``); the committer reads the groups' as it reads the nodes' in a
smaller gang. Of both the next in order takes over where one dies (``gather.py``), and all make the same bytes. That
spreads the reading over as many nodes as there are groups, and of a checkpoint of 2,000 nodes anybody who lists what is
missing sees 45 names.

All agents of a gang must count alike: the gang's ranks and nodes are all that counts (ADR 16).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt

from checkpoint import keys, pages
from checkpoint.agent.gather import Gathered, gather, present
from checkpoint.errors import Damaged
from checkpoint.manifest import ReadPart, join, read_part
from checkpoint.store import Store

GROUPED_ABOVE = 1000
"""Ranks of a gang whose nodes' parts the committer reads itself."""


@dataclass(frozen=True, slots=True)
class NodeGroups:
    """How the nodes of a gang are grouped; ``size`` 1: not at all."""

    nodes: int
    size: int

    @classmethod
    def of(cls, ranks: int, nodes: int) -> NodeGroups:
        """
        >>> NodeGroups.of(1000, 1000).size, NodeGroups.of(16384, 2048).size, NodeGroups.of(16384, 2048).count
        (1, 46, 45)
        """
        return cls(nodes, 1 if ranks <= GROUPED_ABOVE else isqrt(max(nodes - 1, 0)) + 1)

    @property
    def count(self) -> int:
        """Of what the committer reads: groups, or nodes where there are none."""
        return -(-self.nodes // self.size)

    def of_node(self, node: int) -> int:
        return ((node + 1) * self.count - 1) // self.nodes

    def members(self, group: int) -> range:
        """The nodes of a group: as many as of any other, or one fewer. In a group of one nobody would take over.

        >>> groups = NodeGroups.of(2000, 57)
        >>> groups.size, [len(groups.members(g)) for g in range(groups.count)]
        (8, [7, 7, 7, 7, 7, 7, 7, 8])
        >>> all(n in groups.members(groups.of_node(n)) for n in range(57))
        True
        """
        return range(group * self.nodes // self.count, (group + 1) * self.nodes // self.count)

    def name(self, step: int, epoch: int, number: int) -> str:
        """Of a part that the committer reads."""
        return keys.part_name(step, epoch, number) if self.size == 1 else keys.group_name(step, epoch, number)

    def prefix(self, step: int, epoch: int) -> str:
        return keys.parts_prefix(step, epoch) if self.size == 1 else keys.groups_prefix(step, epoch)


def gather_parts(store: Store, run: str, groups: NodeGroups, step: int, epoch: int, known: Gathered[ReadPart]) -> bool:
    """Read what the committer reads, as far as it is there and not ``known``; whether all of it is known now."""

    def read(number: int) -> ReadPart:
        return _read(store, run, groups.name(step, epoch, number), known)

    prefix = keys.run_key(run, groups.prefix(step, epoch))
    return gather(lambda: present(store, prefix, groups.count), groups.count, known, read)


def there(store: Store, run: str, groups: NodeGroups, step: int, epoch: int, group: int) -> set[int]:
    """The nodes of the group whose part is there: one listing, from its first node's on."""
    members = groups.members(group)
    return present(store, keys.run_key(run, keys.parts_prefix(step, epoch)), members.stop, members.start)


def join_group(
    store: Store, run: str, groups: NodeGroups, step: int, epoch: int, group: int, known: Gathered[ReadPart]
) -> bool:
    """Make the group's part, if every node's is there; False where one is missing.

    ``known``: the parts that were read before, to which those found now are added. Raises Damaged where the parts do
    not fit together, StoreError.
    """

    def read(node: int) -> ReadPart:
        return _read(store, run, keys.part_name(step, epoch, node), known)

    members = groups.members(group)
    if not gather(lambda: there(store, run, groups, step, epoch, group), len(members), known, read):
        return False
    part = join(list(known.values()), members, group, groups.count)
    name = keys.group_name(step, epoch, group)
    _, ours = pages.write(store, run, name, part.stream(), f"group{group:05d}")
    if not ours:
        raise Damaged(f"the group's part {keys.run_key(run, name)} is there with other bytes than its nodes' give")
    return True


def _read(store: Store, run: str, name: str, known: Gathered[ReadPart]) -> ReadPart:
    return read_part(name, pages.read(store, run, name, f"part manifest {name}"), known.tables)
