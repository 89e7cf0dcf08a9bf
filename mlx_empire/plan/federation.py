"""Where several models of their own live on several machines: in memory, on disks, and what a swap costs.

Decides, from sizes and weights alone, which machine keeps which model in memory (hot ones first, then by weight), which
other one has a copy to fall back on, what is loaded on demand (cold, or hot without room) and how long that takes from
the disk or over the link. A base is held once by a machine for all adapters of it. Pure functions of numbers: nothing
is measured, asked or moved.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Rate = tuple[float, float]  # low, high


@dataclass(frozen=True)
class Member:
    """A model of the federation. Sizes in bytes.

    `own`: what is read from the disk for it alone: a whole model, or an adapter of `base`, whose bytes others share.
    `cache`: of its conversations, beside the weights while it is in memory. `weight`: how much it is asked for beside
    the others. `hot`: whether it is to be in memory at any time.
    """

    name: str
    own: int
    cache: int = 0
    base: str | None = None
    weight: float = 1.0
    hot: bool = True


@dataclass(frozen=True)
class ModelHost:
    """A machine: bytes that models may fill, and bytes per second of its disk (None: not known) and of its link."""

    name: str
    room: int
    disk: Rate | None
    link: Rate


@dataclass(frozen=True)
class Home:
    """Where a model lives.

    `node`: in memory there, None where it is loaded on demand; `backup`: where a copy lies on the disk, with room to
    take it in (in the place of others, if need be), None where no other machine can hold it. `disk`: the machine that
    loads it when it is not in memory, None where no machine can hold it at all. `swap`: seconds of loading it there
    from the disk, `over_link` from another machine; None where they are not known.
    """

    member: Member
    node: str | None
    disk: str | None
    backup: str | None
    swap: tuple[float, float] | None
    over_link: tuple[float, float] | None


@dataclass(frozen=True)
class Federation:
    """All homes in the members' order; bytes in memory by machine, and bytes on each disk, copies included."""

    homes: tuple[Home, ...]
    used: Mapping[str, int]
    stored: Mapping[str, int]

    @property
    def hot_without_room(self) -> tuple[str, ...]:
        """Models that are to be in memory and are not."""
        return tuple(home.member.name for home in self.homes if home.member.hot and home.node is None)


def needs(member: Member, bases: Mapping[str, int]) -> int:
    """Bytes of a model that is alone on a machine: with its base and its cache."""
    return member.own + member.cache + (bases[member.base] if member.base else 0)


def federate(members: Sequence[Member], places: Sequence[ModelHost], bases: Mapping[str, int]) -> Federation:
    """Homes for `members` on `places`; `bases`: bytes of each base that a member names."""
    node, used = _in_memory(members, places, bases)
    stored = {place.name: 0 for place in places}
    on_disk: dict[str, set[str]] = {place.name: set() for place in places}
    by_name = {place.name: place for place in places}

    def stores(member: Member, where: str | None) -> None:
        if where is None:
            return
        stored[where] += member.own
        if member.base is not None and member.base not in on_disk[where]:
            on_disk[where].add(member.base)
            stored[where] += bases[member.base]

    def best(member: Member, among: Sequence[str]) -> str | None:
        """Where it could be taken in beside the others, where its base lies, where least lies."""
        size = needs(member, bases)

        def order(name: str) -> tuple[bool, bool, int]:
            full = used[name] + size > by_name[name].room
            return full, member.base is not None and member.base not in on_disk[name], stored[name]

        return min(among, key=order, default=None)

    homes = []
    for member in members:
        able = [place.name for place in places if needs(member, bases) <= place.room]
        disk = node.get(member.name) or best(member, able)
        stores(member, disk)
        backup = best(member, [name for name in able if name != disk])
        stores(member, backup)
        if disk is None:
            homes.append(Home(member, None, None, None, None, None))
            continue
        place, size = by_name[disk], needs(member, bases) - member.cache
        swap, over = swap_seconds(size, place.disk), link_seconds(size, place.disk, place.link)
        homes.append(Home(member, node.get(member.name), disk, backup, swap, over))
    return Federation(tuple(homes), used, stored)


def _in_memory(
    members: Sequence[Member], places: Sequence[ModelHost], bases: Mapping[str, int]
) -> tuple[dict[str, str], dict[str, int]]:
    """Which machine keeps which hot model, and bytes used by machine: the most asked for first, then the largest.

    Each where it takes least more (its base may be there), and among those where least room is left, so that large
    models find room later.
    """
    room = {place.name: place.room for place in places}
    used, node = dict.fromkeys(room, 0), dict[str, str]()
    loaded: dict[str, set[str]] = {name: set() for name in room}

    def cost(member: Member, where: str) -> int:
        shared = member.base is None or member.base in loaded[where]
        return member.own + member.cache if shared else needs(member, bases)

    for member in sorted((m for m in members if m.hot), key=lambda m: (-m.weight, -needs(m, bases))):
        able = [name for name in room if used[name] + cost(member, name) <= room[name]]
        if not able:
            continue
        chosen = min(able, key=lambda name: (cost(member, name), room[name] - used[name]))
        used[chosen] += cost(member, chosen)
        node[member.name] = chosen
        if member.base is not None:
            loaded[chosen].add(member.base)
    return node, used


def swap_seconds(size: int, disk: Rate | None) -> tuple[float, float] | None:
    """Seconds in which a machine reads so many bytes from its own disk; None where its disk is not known."""
    return _seconds(size, disk) if disk else None


def link_seconds(size: int, disk: Rate | None, link: Rate) -> tuple[float, float] | None:
    """From another machine like it: the slower of disk and link."""
    return _seconds(size, (min(disk[0], link[0]), min(disk[1], link[1]))) if disk else None


def _seconds(size: int, rate: Rate) -> tuple[float, float]:
    return size / rate[1], size / rate[0]


def fitting_models(size: int, cache: int, room: int) -> int:
    """How many whole models of one size a machine keeps in memory."""
    return room // (size + cache) if size + cache > 0 else 0


def adapters_held(base: int, adapter: int, cache: int, room: int) -> int:
    """How many adapters of one base it keeps there instead; 0 where not even the base goes in."""
    return max(room - base, 0) // (adapter + cache) if room >= base and adapter + cache > 0 else 0
