"""Who may connect: limits per address, room for unfinished handshakes, and bans that expire. No I/O.

Limits by address are for public ones. A private or loopback address can reach only a node that lives in its network,
and there many peers may stand behind one (a container host's, a test's).
"""

from __future__ import annotations

import ipaddress
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

__all__ = ["Gate", "GateLimits", "Ticket", "subnet_of"]

_MAX_REMEMBERED = 4_096  # addresses with a recent connection, and peers with a violation; then the oldest is forgotten


@dataclass(frozen=True, slots=True)
class GateLimits:
    """per_address, per_subnet: live connections from one public IP address (IPv6: /64), and one /24 (IPv6: /48).
    unfinished: handshakes at once in all; unfinished_per_address: of one address. burst, per_second: new connections
    of one public address. violations in `window` seconds ban a peer for `ban` seconds, twice as long each time, up to
    `longest_ban`.
    """

    per_address: int = 32
    per_subnet: int = 128
    unfinished: int = 256
    unfinished_per_address: int = 16
    burst: int = 64
    per_second: float = 4.0
    violations: int = 5
    window: float = 600.0
    ban: float = 3_600.0
    longest_ban: float = 86_400.0


class Ticket:
    """One admitted connection, from its first byte to its end: a context manager."""

    def __init__(self, gate: Gate, address: str, subnet: str) -> None:
        self._gate, self._address, self._subnet = gate, address, subnet
        self._is_unfinished = True

    def __enter__(self) -> Self:
        self._gate._count(self._address, self._subnet, 1)
        self._gate._unfinished[self._address] += 1
        return self

    def established(self) -> None:
        """The handshake is done."""
        if self._is_unfinished:
            self._is_unfinished = False
            _less(self._gate._unfinished, self._address)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.established()
        self._gate._count(self._address, self._subnet, -1)


@dataclass(slots=True)
class _Record:
    """A peer's violations within the window, and its bans."""

    times: deque[float] = field(default_factory=deque)
    banned_until: float = 0.0
    bans: int = 0


class Gate:
    """Decides on connections. `clock` gives seconds; `refused` counts what was turned away."""

    def __init__(self, clock: Callable[[], float], limits: GateLimits = GateLimits()) -> None:
        self._clock = clock
        self._limits = limits
        self.refused = 0
        self._live: Counter[str] = Counter()  # by address and by subnet
        self._unfinished: Counter[str] = Counter()
        self._buckets: dict[str, tuple[float, float]] = {}  # address -> new connections left, as of when
        self._records: dict[str, _Record] = {}

    def admit(self, host: str) -> Ticket | None:
        """A ticket for a connection from an IP address, or None: then it is closed without a byte."""
        address, subnet, is_public = _groups(host)
        limits = self._limits
        waiting = sum(self._unfinished.values())
        # Where all places are taken, who has none yet still gets in: a flood from some addresses shuts nobody out.
        is_full = waiting >= limits.unfinished and (self._unfinished[address] > 0 or waiting >= 2 * limits.unfinished)
        if is_full or (is_public and not self._is_within(address, subnet)):
            self.refused += 1
            return None
        return Ticket(self, address, subnet)

    def _is_within(self, address: str, subnet: str) -> bool:
        limits = self._limits
        if self._unfinished[address] >= limits.unfinished_per_address:
            return False
        if self._live[address] >= limits.per_address or self._live[subnet] >= limits.per_subnet:
            return False
        now = self._clock()
        left, since = self._buckets.pop(address, (float(limits.burst), now))
        left = min(float(limits.burst), left + (now - since) * limits.per_second)
        self._buckets[address] = (left - (left >= 1), now)
        if len(self._buckets) > _MAX_REMEMBERED:
            del self._buckets[next(iter(self._buckets))]
        return left >= 1

    def violated(self, peer_id: str) -> bool:
        """Note that a peer broke a protocol; whether that bans it now."""
        now = self._clock()
        record = self._records.pop(peer_id, None) or _Record()
        self._records[peer_id] = record
        if len(self._records) > _MAX_REMEMBERED:  # a ban is not forgotten for strangers that behave badly once
            del self._records[next((each for each in self._records if not self.ban_left(each)), peer_id)]
        while record.times and record.times[0] < now - self._limits.window:
            record.times.popleft()
        record.times.append(now)
        if len(record.times) < self._limits.violations or record.banned_until > now:
            return False
        record.times.clear()
        record.banned_until = now + min(self._limits.ban * 2**record.bans, self._limits.longest_ban)
        record.bans = min(record.bans + 1, 16)
        return True

    def ban_left(self, peer_id: str) -> float:
        """For how many seconds a peer is still banned; 0 where it is not."""
        record = self._records.get(peer_id)
        return max(0.0, record.banned_until - self._clock()) if record is not None else 0.0

    @property
    def banned(self) -> tuple[str, ...]:
        """The peer ids that are banned now."""
        return tuple(peer_id for peer_id in self._records if self.ban_left(peer_id))

    def _count(self, address: str, subnet: str, change: int) -> None:
        for group in (address, subnet):
            self._live[group] += change
            if not self._live[group]:
                del self._live[group]


def subnet_of(host: str) -> str:
    """The network that an IP address belongs to, as the limits count: its /24, or /48 for IPv6."""
    return _groups(host)[1]


def _groups(host: str) -> tuple[str, str, bool]:
    """What an address counts for: itself (or its /64), its subnet, and whether it is public."""
    parsed = ipaddress.ip_address(host.split("%")[0])
    if isinstance(parsed, ipaddress.IPv6Address) and parsed.ipv4_mapped is not None:
        parsed = parsed.ipv4_mapped
    one, many = (64, 48) if parsed.version == 6 else (32, 24)
    address, subnet = (str(ipaddress.ip_network((parsed, bits), strict=False)) for bits in (one, many))
    return address, subnet, parsed.is_global


def _less(counter: Counter[str], key: str) -> None:
    counter[key] -= 1
    if not counter[key]:
        del counter[key]
