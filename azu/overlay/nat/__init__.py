"""Being reached from behind a router.

messages      length-prefixed protobuf on a stream, and multiaddrs as the bytes in it
relay         the relay: circuits between two peers that cannot connect, within limits (circuit relay v2)
circuits      the relay's client: a reservation, connections that come and go through it
punch         a direct connection out of a relayed one (DCUtR)
autonat       may strangers connect to us? (AutoNAT v1)
mapping       asking the router to let them (UPnP, NAT-PMP)
reachability  puts these together: finds out how this node can be reached, and sees to it
"""

from __future__ import annotations

__all__: list[str] = []
