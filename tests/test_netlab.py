"""The laboratory's NATs do what their names say: shown with TCP sockets, used as a hole puncher uses them."""

from __future__ import annotations

import errno
import ipaddress
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
import trio

from tests.netlab import Host, Lab, Nat, laboratory, why_not

PORT = 5000  # of every host at home, for listening and dialling alike
ROOT = Path(__file__).parents[1]
LIMIT = 30.0  # seconds; only a hung test waits so long
KINDS: tuple[Nat, ...] = ("full-cone", "port-restricted", "symmetric")
Bind = Callable[..., socket.socket]

lab = pytest.fixture(laboratory)


@pytest.fixture
def bind() -> Iterator[Bind]:
    """`bind(host, port)`: a TCP socket inside, as libp2p implementations bind theirs to reuse the listening port."""
    with ExitStack() as stack:

        def bound(host: Host, port: int = PORT) -> socket.socket:
            with host.entered():
                sock = stack.enter_context(socket.socket())
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            sock.settimeout(LIMIT)
            sock.bind(("", port))
            return sock

        yield bound


def listen(sock: socket.socket) -> socket.socket:
    sock.listen()
    return sock


def start_dialling(sock: socket.socket, address: str, port: int) -> socket.socket:
    sock.setblocking(False)
    assert sock.connect_ex((address, port)) in (0, errno.EINPROGRESS)
    return sock


def is_connected(sock: socket.socket) -> bool:
    """Raises OSError if the attempt has failed, as by a reset."""
    _, finished, _ = select.select([], [sock], [], 0)
    if error := sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
        raise OSError(error, os.strerror(error))
    return bool(finished)


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def accept(listener: socket.socket) -> tuple[str, int]:
    """Where the next connection came from; it is closed."""
    accepted, (address, port) = listener.accept()
    accepted.close()
    return address, port


def seen_by(server: Host, host: Host, bind: Bind) -> tuple[str, int]:
    """The mapping: the address and port from which a public server sees `host` come."""
    with listen(bind(server)) as listener:
        bind(host).connect((server.address, PORT))
        return accept(listener)


def both_ends(dialling: list[socket.socket], listeners: list[socket.socket]) -> list[socket.socket]:
    """Of the one connection: both that dial (it is a simultaneous open), or one and what a listener accepted."""
    until(lambda: all(map(is_connected, dialling)) or select.select(listeners, [], [], 0)[0])
    if accepting := select.select(listeners, [], [], 0)[0]:
        return [next(filter(is_connected, dialling)), accepting[0].accept()[0]]
    return dialling


def retransmissions(sock: socket.socket) -> int:
    return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 8)[2]  # tcpi_retransmits, <linux/tcp.h>


def transfer(data: bytes, sender: socket.socket, receiver: socket.socket) -> bytes:
    """Send in a thread, and return what arrives; both are closed."""
    for sock in (sender, receiver):
        sock.settimeout(LIMIT)
    with sender, receiver, ThreadPoolExecutor(1) as pool, receiver.makefile("rb") as stream:
        sending = pool.submit(sender.sendall, data)
        received = stream.read(len(data))
        sending.result()
    return received


def test_addresses_are_what_the_code_under_test_takes_them_for(lab: Lab) -> None:
    home = lab.home(hosts=2)
    public = [ipaddress.ip_address(each) for each in (lab.public_host().address, home.address, lab.home().address)]
    assert all(each.is_global for each in public)
    assert len({each.packed[:2] for each in public}) == 3  # of different /16s
    assert all(ipaddress.ip_address(host.address).is_private for host in home.hosts)


def interfaces(listing: str) -> set[str]:
    return {line.split()[1].rstrip(":").partition("@")[0] for line in listing.splitlines()}


def test_a_host_has_a_line_to_the_laboratory_and_none_to_the_machine(lab: Lab) -> None:
    listing = ["ip", "-oneline", "link"]
    before = interfaces(subprocess.run(listing, capture_output=True, text=True, check=True).stdout)
    home = lab.home()
    assert interfaces(home.hosts[0].run(listing)) == {"lo", "eth0"}
    assert interfaces(home.router.run(listing)) == {"lo", "wan", "lan", "lan2"}
    assert interfaces(subprocess.run(listing, capture_output=True, text=True, check=True).stdout) == before
    with pytest.raises(RuntimeError, match=r"false ended with 1"):
        home.hosts[0].run(["false"])


def test_a_thread_enters_alone_and_comes_back(lab: Lab) -> None:
    host, main = lab.public_host(), f"/proc/self/task/{threading.get_native_id()}/ns/net"
    here = os.readlink(main)

    def enter_and_fail() -> None:
        with host.entered():
            assert os.readlink("/proc/thread-self/ns/net") != os.readlink(main) == here
            raise ZeroDivisionError

    with ThreadPoolExecutor(1) as pool:
        with pytest.raises(ZeroDivisionError):
            pool.submit(enter_and_fail).result()
        assert pool.submit(os.readlink, "/proc/thread-self/ns/net").result() == here


def test_trio_runs_inside(lab: Lab) -> None:
    server, home, ready = lab.public_host(), lab.home(), threading.Event()

    async def greet_once() -> None:
        (listener,) = await trio.open_tcp_listeners(PORT, host=server.address)
        ready.set()
        async with listener, await listener.accept() as stream:
            await stream.send_all(stream.socket.getpeername()[0].encode())

    async def be_greeted() -> bytes:
        async with await trio.open_tcp_stream(server.address, PORT) as stream:
            return b"".join([part async for part in stream])

    def run(host: Host, main: Callable[[], Awaitable[object]]) -> object:
        with host.entered():
            return trio.run(main)

    with ThreadPoolExecutor(2) as pool:
        serving = pool.submit(run, server, greet_once)
        assert ready.wait(LIMIT)
        assert pool.submit(run, home.hosts[0], be_greeted).result() == home.address.encode()
        serving.result()


def test_trios_worker_threads_stay_where_they_were_started(lab: Lab) -> None:
    async def where_a_worker_is() -> str:
        return await trio.to_thread.run_sync(os.readlink, "/proc/thread-self/ns/net")

    def inside() -> str:
        with lab.public_host().entered():
            return trio.run(where_a_worker_is)

    with ThreadPoolExecutor(1) as pool:
        there = pool.submit(inside).result()
    assert there != trio.run(where_a_worker_is) == os.readlink("/proc/self/ns/net")


def test_loopback_is_up_everywhere(lab: Lab) -> None:
    home = lab.home()
    for host in (lab.public_host(), home.router, home.hosts[0]):
        with host.entered(), socket.create_server(("127.0.0.1", 0)) as listener:
            socket.create_connection(listener.getsockname(), LIMIT).close()


@pytest.mark.parametrize("nat", KINDS)
def test_mappings_depend_on_the_destination_only_behind_a_symmetric_nat(nat: Nat, lab: Lab, bind: Bind) -> None:
    servers, home = (lab.public_host(), lab.public_host()), lab.home(nat, hosts=2)
    for number, host in enumerate(home.hosts):
        one, other = (seen_by(server, host, bind) for server in servers)
        assert one[0] == other[0] == home.address
        assert (one[1] == other[1]) == (nat != "symmetric")
        assert (one[1] == PORT) == (nat != "symmetric" and number == 0)  # it is taken when the second host comes


@pytest.mark.parametrize("nat", KINDS)
def test_a_stranger_comes_in_only_through_a_full_cone_and_only_after_the_host_went_out(
    nat: Nat, lab: Lab, bind: Bind
) -> None:
    server, stranger, home = lab.public_host(), lab.public_host(), lab.home(nat, hosts=2)
    listener = listen(bind(home.hosts[1]))
    early = start_dialling(bind(stranger, 0), home.address, PORT)
    until(lambda: home.unsolicited() >= 1)
    assert not is_connected(early)  # and neither is it refused
    early.close()
    _, address = [seen_by(server, host, bind) for host in home.hosts]  # the second host's port is not its own
    before = home.unsolicited()
    late = start_dialling(bind(stranger, 0), *address)
    until(lambda: is_connected(late) or home.unsolicited() >= before + 2)
    assert is_connected(late) == (nat == "full-cone")
    if nat == "full-cone":
        assert accept(listener) == (stranger.address, late.getsockname()[1])


@pytest.mark.parametrize(
    ("one", "other", "works"),
    [
        ("port-restricted", "port-restricted", True),
        ("full-cone", "port-restricted", True),
        ("full-cone", "symmetric", True),
        ("port-restricted", "symmetric", False),
        ("symmetric", "symmetric", False),
    ],
)
def test_simultaneous_open_gets_through_where_it_should(
    one: Nat, other: Nat, works: bool, lab: Lab, bind: Bind
) -> None:
    relay, homes = lab.public_host(), (lab.home(one), lab.home(other))
    listeners = [listen(bind(home.hosts[0])) for home in homes]
    addresses = [seen_by(relay, home.hosts[0], bind) for home in homes]
    relayed = [lab.bytes_between(home, relay) for home in homes]

    dialling = [start_dialling(bind(homes[0].hosts[0]), *addresses[1])]
    until(lambda: homes[1].unsolicited() >= 1)  # the first came too early, and must not have done harm
    dialling.append(start_dialling(bind(homes[1].hosts[0]), *addresses[0]))

    until(lambda: any(map(is_connected, dialling)) or all(home.unsolicited() >= 2 for home in homes))
    assert any(map(is_connected, dialling)) == works
    if works:
        data = os.urandom(1 << 20)
        assert transfer(data, *both_ends(dialling, listeners)) == data
        assert lab.bytes_between(*homes) > len(data)
    # The relay saw no more than the closing of the connections to it.
    assert all(lab.bytes_between(home, relay) < before + 1000 for home, before in zip(homes, relayed, strict=True))


def test_bytes_are_counted_by_pair(lab: Lab, bind: Bind) -> None:
    relay, home, other = lab.public_host(), lab.home(), lab.home()
    listener = listen(bind(relay))
    near = bind(home.hosts[0])
    near.connect((relay.address, PORT))
    transfer(bytes(1 << 20), near, listener.accept()[0])
    assert lab.bytes_between(home, relay) == lab.bytes_between(relay, home) > 1 << 20
    assert lab.bytes_between(other, relay) == lab.bytes_between(home, other) == 0
    with pytest.raises(ValueError, match="not a public address"):
        lab.bytes_between(home.hosts[0], relay)


def test_hosts_of_a_home_reach_each_other_and_strangers_cannot_name_them(lab: Lab, bind: Bind) -> None:
    home, stranger = lab.home(hosts=2), lab.public_host()
    listener = listen(bind(home.hosts[1]))
    bind(home.hosts[0]).connect((home.hosts[1].address, PORT))
    assert accept(listener) == (home.hosts[0].address, PORT)
    lost = start_dialling(bind(stranger), home.hosts[1].address, PORT)
    until(lambda: retransmissions(lost) >= 1)
    assert not is_connected(lost)


def test_a_mapped_port_is_open_to_strangers_until_it_is_taken_away(lab: Lab, bind: Bind) -> None:
    home, stranger = lab.home(), lab.public_host()
    listener = listen(bind(home.hosts[0]))
    home.map_port(4001, home.hosts[0], PORT)
    bind(stranger, 0).connect((home.address, 4001))
    assert accept(listener)[0] == stranger.address
    with pytest.raises(RuntimeError, match="exist"):
        home.map_port(4001, home.hosts[0], PORT + 1)
    home.unmap_port(4001)
    late = start_dialling(bind(stranger, 0), home.address, 4001)
    until(lambda: home.unsolicited() >= 1)
    assert not is_connected(late)


def test_a_home_may_be_far_away(lab: Lab, bind: Bind) -> None:
    server, home = lab.public_host(), lab.home(delay=0.05)
    listener = listen(bind(server))
    near = bind(home.hosts[0])
    started = time.monotonic()
    near.connect((server.address, PORT))
    assert time.monotonic() - started >= 0.1  # there and back
    data = os.urandom(8 << 20)
    assert transfer(data, near, listener.accept()[0]) == data


def test_what_a_killed_run_left_is_taken_away_and_what_a_running_one_has_is_not(lab: Lab) -> None:
    script = (
        "import os, signal, sys; from tests.netlab import Lab; lab = Lab().__enter__()\n"
        "print(lab.home(delay=0.001).router.namespace, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    command = [sys.executable, "-c", script]
    killed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT)
    left = Path("/run/netns", killed.stdout.strip())
    assert killed.returncode == -signal.SIGKILL
    mine = Path("/run/netns", lab.public_host().namespace)
    with Lab() as another:
        theirs = Path("/run/netns", another.public_host().namespace)
        assert (left.exists(), mine.exists(), theirs.exists()) == (False, True, True)
    assert (mine.exists(), theirs.exists()) == (True, False)


def test_the_reason_says_what_is_missing(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setenv("PATH", "/nowhere")
        assert "apt-get install iproute2 nftables" in (why_not.__wrapped__() or "")


@pytest.mark.skipif(shutil.which("setpriv") is None, reason="needs util-linux's setpriv")
def test_the_reason_says_that_the_kernel_refuses(lab: Lab) -> None:
    script = "from tests.netlab import why_not; print(why_not())"
    command = ["setpriv", "--bounding-set=-sys_admin", sys.executable, "-c", script]
    asked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=LIMIT)
    assert "kernel or container refuses" in asked.stdout
