"""A small internet out of network namespaces, with home networks behind NAT, for tests on Linux as root.

    with Lab() as lab:
        relay = lab.public_host()
        home = lab.home(nat="port-restricted")
        subprocess.Popen(home.hosts[0].command([sys.executable, "-m", "something", relay.address]))
        with relay.entered():
            listener = socket.create_server(("", 4001))  # a socket stays in the namespace in which it was made
        assert lab.bytes_between(home, relay) == 0

One namespace plays the internet: it routes between all public addresses, swallows packets for any other (private ones
too), and counts. Each public host, each home's router and each of a home's hosts is a namespace of its own. Nothing
is connected to the machine's own network, so the public addresses are free to choose: every host and every home has
one in a /16 of its own, which Python's `ipaddress` calls global. A home's LAN is 192.168.N.0/24.

NAT kinds, in the terms of RFC 4787 and RFC 5382; all keep silent towards packets that nobody asked for, as home
routers do (no RST, no ICMP, and no connection tracking entry that would take a port away):

    kind             mapping               filtering
    full-cone        endpoint-independent  endpoint-independent: strangers may come in once a port was used outwards
    port-restricted  endpoint-independent  address and port-dependent: only whom the host sent something to
    symmetric        a random port for     address and port-dependent
                     each destination

An endpoint-independent mapping keeps the host's own port. Where two hosts of a home use the same port towards the same
server, the second gets another port and keeps that, as behind a Linux router. There is no hairpinning.

Debian: apt-get install iproute2 nftables. tc's netem is not needed: `delay` is a pair of TUN devices.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import itertools
import json
import os
import select
import shutil
import struct
import subprocess
import sys
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

from outcome import Outcome
from trio._core import _thread_cache
from trio._core._thread_cache import ThreadCache

__all__ = ["Home", "Host", "Lab", "Nat", "laboratory", "why_not"]

T = TypeVar("T")

Nat = Literal["full-cone", "port-restricted", "symmetric"]

_PREFIX = "azulab"
_GATEWAY = "25.0.0.1"  # the internet's end of every line; host number n is 25.n.0.1
_CLONE_NEWNET = 0x40000000
_TUNSETIFF, _TUNSETOFFLOAD = 0x400454CA, 0x400454D0
_IFF_TUN, _IFF_NO_PI, _IFF_VNET_HDR = 0x0001, 0x1000, 0x4000
_TUN_F_CSUM, _TUN_F_TSO4 = 0x01, 0x02

# A counter for each pair of source and destination; `add` counts, too, where the pair is known already.
_COUNTING = """
table ip lab {
    set pairs { type ipv4_addr . ipv4_addr; size 65535; flags dynamic; counter; }
    chain forward { type filter hook forward priority filter; add @pairs { ip saddr . ip daddr }; }
}
"""

# An inbound packet that belongs to nothing is for the router itself. It is dropped there before connection tracking
# confirms an entry for it (which happens after the input chain), so it neither gets an answer nor takes up a port.
_ROUTING = """
table ip lab {
    map mappings { type inet_proto . inet_service : ipv4_addr . inet_service; size 65535; flags dynamic; }
    counter unsolicited { }
    chain prerouting {
        type nat hook prerouting priority dstnat
        iifname "wan" dnat ip to meta l4proto . th dport map @mappings
    }
    chain input {
        type filter hook input priority filter; policy drop
        iifname != "wan" accept
        ct state established,related accept
        counter name unsolicited
    }
    chain postrouting { type nat hook postrouting priority srcnat; oifname "wan" %(masquerade)s; }
    chain translated { type filter hook postrouting priority srcnat + 10; %(translated)s; }
}
"""
_MASQUERADE = {"full-cone": "masquerade", "port-restricted": "masquerade", "symmetric": "masquerade fully-random"}
_OPEN_TO_ALL = (  # the port that was chosen for a new connection leads back to where the connection came from
    'oifname "wan" ct state new meta l4proto { tcp, udp } '
    "add @mappings { meta l4proto . th sport : ct original ip saddr . ct original proto-src }"
)


@dataclass(frozen=True, slots=True)
class Host:
    """A namespace with one address (IPv4) by which the others know it; a router's is its public one."""

    namespace: str
    address: str

    def command(self, arguments: Sequence[str]) -> list[str]:
        """The command line that runs another one inside; the process keeps its pid (ip replaces itself)."""
        return ["ip", "netns", "exec", self.namespace, *arguments]

    def run(self, arguments: Sequence[str], stdin: str = "") -> str:
        """Run a command inside to its end, and return what it printed. Raises RuntimeError if it failed."""
        return _run(self.command(arguments), stdin)

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Put the calling thread inside: sockets, threads and processes that it makes in the block belong there.

        A whole `trio.run` works, in a thread of its own; the worker threads that it starts are inside too.
        """
        with open("/proc/thread-self/ns/net") as outside, open(f"/run/netns/{self.namespace}") as inside:
            _setns(inside.fileno())
            try:
                yield
            finally:
                _setns(outside.fileno())


@dataclass(frozen=True, slots=True)
class Home:
    """A router with one public `address`, and the hosts on its LAN (bridge `lan`, where the router ends in .1).

    A UPnP or NAT-PMP server runs in `router` and calls `map_port` when it is asked.
    """

    router: Host
    hosts: tuple[Host, ...]

    @property
    def address(self) -> str:
        return self.router.address

    def map_port(self, port: int, host: Host, host_port: int, protocol: Literal["tcp", "udp"] = "tcp") -> None:
        """Lead the public `port` to a host's, for everybody. Raises RuntimeError if it leads elsewhere already."""
        element = f"{protocol} . {port} : {host.address} . {host_port}"
        self.router.run(["nft", "-f", "-"], f"create element ip lab mappings {{ {element} }}")

    def unmap_port(self, port: int, protocol: Literal["tcp", "udp"] = "tcp") -> None:
        """Take such a mapping away; connections that use it live on."""
        self.router.run(["nft", "-f", "-"], f"delete element ip lab mappings {{ {protocol} . {port} }}")

    def unsolicited(self) -> int:
        """How many packets from outside the router has dropped so far."""
        (counter,) = _nft_objects(self.router, "counter", "unsolicited")
        return int(counter["packets"])


class Lab:
    """The internet and all that is on it; leaving the block takes everything away.

    Processes that were started inside are the caller's to end. What a killed run has left is taken away by the next.
    """

    _count = itertools.count(1)

    def __init__(self) -> None:
        self._name = f"{_PREFIX}-{os.getpid()}-{_started(os.getpid())}-{next(Lab._count)}"
        self._internet = Host(f"{self._name}-internet", _GATEWAY)
        self._public = itertools.count(1)
        self._addresses: set[str] = set()
        self._lines = ExitStack()

    def __enter__(self) -> Self:
        _remove(name for name in _namespaces() if _is_orphan(name))
        try:
            _run(["ip", "netns", "add", self._internet.namespace])
            _configure(self._internet, ["link set lo up", f"address add {_GATEWAY}/32 dev lo"])
            # As it is out there: no answer at all from an address that nobody has.
            _configure(self._internet, ["route add blackhole 0.0.0.0/0"])
            _forward(self._internet, _COUNTING)
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def _close(self) -> None:
        self._lines.close()
        _remove(name for name in _namespaces() if name.startswith(f"{self._name}-"))

    def public_host(self, address: str | None = None) -> Host:
        """A host on the internet; `address` where it matters, as for two in one subnet."""
        number = next(self._public)
        host = Host(f"{self._name}-public{number}", address or f"25.{number}.0.1")
        self._connect(host, "eth0", number, 0)
        return host

    def home(
        self, nat: Nat = "port-restricted", hosts: int = 1, *, address: str | None = None, delay: float = 0
    ) -> Home:
        """A home with that many hosts. `delay`: seconds that a packet takes between the home and the internet."""
        number = next(self._public)
        router = Host(f"{self._name}-home{number}", address or f"25.{number}.0.1")
        self._connect(router, "wan", number, delay)
        lan = f"192.168.{number}"
        _configure(router, ["link add lan type bridge", f"address add {lan}.1/24 dev lan", "link set lan up"])
        translated = _OPEN_TO_ALL if nat == "full-cone" else "accept"
        _forward(router, _ROUTING % {"masquerade": _MASQUERADE[nat], "translated": translated})
        return Home(router, tuple(self._at_home(router, lan, index) for index in range(2, hosts + 2)))

    def bytes_between(self, one: Host | Home, other: Host | Home) -> int:
        """How many bytes of IP packets the internet has carried between two public addresses so far, both ways.

        Raises ValueError for an address that is not on the internet: that of a host at home would always read 0.
        """
        if unknown := {one.address, other.address} - self._addresses:
            raise ValueError(f"not a public address of this laboratory: {', '.join(unknown)}")
        pairs = {(one.address, other.address), (other.address, one.address)}
        (counted,) = _nft_objects(self._internet, "set", "pairs")
        elements = [element["elem"] for element in counted.get("elem", ())]
        return sum(each["counter"]["bytes"] for each in elements if tuple(each["val"]["concat"]) in pairs)

    def _connect(self, host: Host, device: str, number: int, delay: float) -> None:
        """Make the namespace and its line to the internet, where the other end is called n<number>."""
        _run(["ip", "netns", "add", host.namespace])
        peer = f"n{number}"
        carrier: AbstractContextManager[None] = nullcontext()
        if delay:
            carrier = _delay_process(self._tun(host, device), self._tun(self._internet, peer), delay)
        else:
            _veth(host, device, self._internet, peer)
        _configure(host, ["link set lo up", f"address add {host.address}/32 dev {device}", f"link set {device} up"])
        _configure(host, [f"route add default via {_GATEWAY} dev {device} onlink"])
        _configure(self._internet, [f"link set {peer} up", f"route add {host.address}/32 dev {peer}"])
        self._lines.enter_context(carrier)
        self._addresses.add(host.address)

    def _tun(self, host: Host, name: str) -> int:
        """A TUN device, whose frames may be larger than its MTU (segmentation is the receiver's, as on a veth)."""
        with host.entered():
            device = os.open("/dev/net/tun", os.O_RDWR)
        self._lines.callback(os.close, device)
        fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TUN | _IFF_NO_PI | _IFF_VNET_HDR))
        fcntl.ioctl(device, _TUNSETOFFLOAD, _TUN_F_CSUM | _TUN_F_TSO4)
        return device

    def _at_home(self, router: Host, lan: str, index: int) -> Host:
        host = Host(f"{router.namespace}-host{index}", f"{lan}.{index}")
        _run(["ip", "netns", "add", host.namespace])
        _veth(host, "eth0", router, f"lan{index}")
        _configure(router, [f"link set lan{index} master lan up"])
        _configure(host, ["link set lo up", f"address add {host.address}/24 dev eth0", "link set eth0 up"])
        _configure(host, [f"route add default via {lan}.1"])
        return host


@functools.cache
def why_not() -> str | None:
    """Why no laboratory can be made here, and what would help; None where one can: it makes one to find out."""
    if os.geteuid() != 0:
        return "NO NETWORK LABORATORY: namespaces need root. Run these tests as root"
    if missing := [tool for tool in ("ip", "nft") if shutil.which(tool) is None]:
        return f"NO NETWORK LABORATORY: {' and '.join(missing)} not found. apt-get install iproute2 nftables"
    try:
        with Lab() as lab:
            lab.home("full-cone", delay=0.001)
    except (OSError, RuntimeError) as error:
        return f"NO NETWORK LABORATORY: this kernel or container refuses. {error}"
    return None


def laboratory() -> Iterator[Lab]:
    """A pytest fixture's body, `lab = pytest.fixture(laboratory)`: a Lab for the test, or a skip that says why not."""
    import pytest  # here, since the process of `_delay_process` needs only the standard library

    if reason := why_not():
        pytest.skip(reason)
    with Lab() as lab:
        yield lab


def _run(command: Sequence[str], stdin: str = "") -> str:
    done = subprocess.run(command, input=stdin, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {(done.stderr or done.stdout).strip()}")
    return done.stdout


def _configure(host: Host, lines: Iterable[str]) -> None:
    _run(["ip", "-netns", host.namespace, "-batch", "-"], "\n".join(lines))


def _forward(host: Host, rules: str) -> None:
    """Make a router of it; the rules come first, so that no packet passes without them."""
    host.run(["nft", "-f", "-"], rules)
    with host.entered():
        Path("/proc/sys/net/ipv4/ip_forward").write_text("1")


def _veth(one: Host, device: str, other: Host, peer: str) -> None:
    ends = f"{device} netns {one.namespace} type veth peer name {peer} netns {other.namespace}"
    _run(["ip", "link", "add", *ends.split()])


def _nft_objects(host: Host, kind: str, name: str) -> list[dict[str, Any]]:
    listed = json.loads(host.run(["nft", "-j", "list", kind, "ip", "lab", name]))
    return [each[kind] for each in listed["nftables"] if kind in each]


class _WorkersPerNamespace(ThreadCache):
    """Trio lends its idle worker threads to anybody in the process, though each is in the namespace it began in."""

    def __init__(self) -> None:
        super().__init__()
        self._caches: defaultdict[int, ThreadCache] = defaultdict(ThreadCache)

    def start_thread_soon(
        self, fn: Callable[[], T], deliver: Callable[[Outcome[T]], object], name: str | None = None
    ) -> None:
        self._caches[os.stat("/proc/thread-self/ns/net").st_ino].start_thread_soon(fn, deliver, name)


_thread_cache.THREAD_CACHE = _WorkersPerNamespace()


def _setns(namespace: int) -> None:
    # os.setns came with Python 3.12.
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(namespace, _CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "setns: " + os.strerror(ctypes.get_errno()))


def _namespaces() -> list[str]:
    folder = Path("/run/netns")
    return [each.name for each in folder.iterdir() if each.name.startswith(f"{_PREFIX}-")] if folder.is_dir() else []


def _is_orphan(namespace: str) -> bool:
    _, pid, started, *_ = namespace.split("-")
    return _started(int(pid)) != int(started)


def _started(pid: int) -> int | None:
    """When a process began (clock ticks since boot), which tells it from a later one with the same id."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return int(stat.rpartition(")")[2].split()[19])


def _remove(namespaces: Iterable[str]) -> None:
    # -force goes on after an error: a laboratory that was made at the same time may have removed the same leftovers.
    subprocess.run(
        ["ip", "-force", "-batch", "-"],
        input="".join(f"netns delete {name}\n" for name in namespaces),
        capture_output=True,
        text=True,
    )


@contextmanager
def _delay_process(one: int, other: int, seconds: float) -> Iterator[None]:
    """Own a line between two TUN devices, a process of its own: packets must not wait for the test's own work."""
    command = [sys.executable, "-I", __file__, str(one), str(other), str(seconds)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=(one, other))
    try:
        yield
    finally:
        process.communicate()


def _carry(one: int, other: int, seconds: float) -> None:
    """Copy packets both ways, each `seconds` after it came, until stdin ends (also by the death of who holds it)."""
    stdin, opposite = sys.stdin.fileno(), {one: other, other: one}
    on_their_way: deque[tuple[float, int, bytes]] = deque()  # (when due, where to, packet), in the order of both
    while True:
        wait = max(0.0, on_their_way[0][0] - time.monotonic()) if on_their_way else None
        ready, _, _ = select.select([stdin, one, other], [], [], wait)
        if stdin in ready:
            return
        due = time.monotonic() + seconds
        on_their_way.extend((due, opposite[device], os.read(device, 1 << 17)) for device in ready)
        while on_their_way and on_their_way[0][0] <= time.monotonic():
            _, device, packet = on_their_way.popleft()
            with suppress(OSError):  # the device is down: so is the line, and what is on it is lost
                os.write(device, packet)


if __name__ == "__main__":
    _carry(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
