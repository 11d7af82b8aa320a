"""The overlay: the only folder of azu that knows libp2p.

Behind it lie a libp2p host (TCP, Noise, Yamux), a Kademlia DHT with validated records, and streams between
authenticated peers. No libp2p exception or type passes this border; see `azu.errors` for what does.
"""

from __future__ import annotations

from azu.overlay._yamux import BATCH_BYTES
from azu.overlay.addresses import PeerAddress, parse_peer_multiaddr
from azu.overlay.dht import MAX_RECORD_BYTES, RecordValidator
from azu.overlay.host import Overlay, OverlayStatistics
from azu.overlay.lookup import Hop, Trace
from azu.overlay.nat.reachability import RELAYS_KEY, Finding, Reach
from azu.overlay.nat.relay import RelayLimits, RelayStatistics
from azu.overlay.opening import OverlayConfig, open_overlay
from azu.overlay.providers import ANNOUNCE_SECONDS, PROVIDER_SECONDS
from azu.overlay.streams import OverlayStream

__all__ = [
    "ANNOUNCE_SECONDS",
    "BATCH_BYTES",
    "MAX_RECORD_BYTES",
    "PROVIDER_SECONDS",
    "RELAYS_KEY",
    "Finding",
    "Hop",
    "Overlay",
    "OverlayConfig",
    "OverlayStatistics",
    "OverlayStream",
    "PeerAddress",
    "Reach",
    "RecordValidator",
    "RelayLimits",
    "RelayStatistics",
    "Trace",
    "open_overlay",
    "parse_peer_multiaddr",
]
