"""What `azu-dht` shows of a swarm.

survey     asks the DHT and pings the peers: the only part that does IO, and that loads the overlay
snapshot   what the survey found
coverage   which layers of which model somebody has loaded
peers      snapshot -> rows of a table, or a document for --json
models     the same for models and their coverage
text       strangers' text made fit for a terminal
screen     tables, and cards where a terminal is too narrow for one
"""

from __future__ import annotations

__all__: list[str] = []
