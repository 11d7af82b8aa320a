"""IPv6 for public hosts of the network laboratory (tests.netlab), beside their IPv4."""

from __future__ import annotations

from pathlib import Path

from tests.netlab import Host, Lab

_GATEWAY = "fe80::1"  # the internet's end of every line
_FIREWALL = """
table ip6 firewall {
    chain input {
        type filter hook input priority filter; policy drop
        iifname "lo" accept
        meta l4proto ipv6-icmp accept
        ct state established,related accept
    }
}
"""


def public_host6(lab: Lab) -> tuple[Host, str]:
    """A host on the internet that has an IPv6 address, too, and that address."""
    host = lab.public_host()
    number = host.address.split(".")[1]
    address, device, internet = f"2a00:{number}::1", f"n{number}", lab._internet
    with internet.entered():
        Path("/proc/sys/net/ipv6/conf/all/forwarding").write_text("1")
    # nodad: an address that is being probed for duplicates cannot be used for a second.
    internet.run(["ip", "address", "add", f"{_GATEWAY}/64", "dev", device, "nodad"])
    internet.run(["ip", "route", "add", f"{address}/128", "dev", device])
    host.run(["ip", "address", "add", f"{address}/128", "dev", "eth0", "nodad"])
    host.run(["ip", "route", "add", "default", "via", _GATEWAY, "dev", "eth0"])
    return host, address


def put_behind_firewall(host: Host) -> None:
    """Let nobody in over IPv6 whom the host has not sent something, as home routers do."""
    host.run(["nft", "-f", "-"], _FIREWALL)
