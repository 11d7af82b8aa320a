"""What to say, and to advise, where there is nothing to show. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from azu.dht.snapshot import Snapshot
from azu.dht.text import duration

__all__ = ["no_model", "no_provider", "nobody"]


def nobody(snapshot: Snapshot, bootstrap: Sequence[str]) -> str:
    """Where there is neither a worker nor a coordinator."""
    if snapshot.clock_ahead is not None:
        ahead = snapshot.clock_ahead
        return (
            f"Peers answer here, but their records {'have expired' if ahead > 0 else 'are dated in the future'}: this "
            f"machine's clock is about {duration(abs(ahead))} {'ahead of' if ahead > 0 else 'behind'} theirs.\n"
            "  to compare:  date -u\n"
            "  to set it:   timedatectl set-ntp true"
        )
    lines = [
        "This swarm has no workers and no coordinators right now.",
        f"  to add a worker:       azu-node join {bootstrap[0]}",
        f"  to add a coordinator:  azu-coordinator serve --bootstrap {bootstrap[0]} --model PATH_OR_HUB_ID",
    ]
    if snapshot.expired:
        lines.append(
            f"  Expired records left out: {snapshot.expired}. Those peers do not answer: they are gone, or cut off."
        )
    if snapshot.early:
        lines.append(f"  Records dated in the future: {snapshot.early}. Compare this machine's clock: date -u")
    if snapshot.silent:
        lines.append(f"  Announced without a record: {snapshot.silent}. They are just starting, or gone.")
    return "\n".join(lines)


def no_model(bootstrap: Sequence[str]) -> str:
    """Where nobody offers a model, or has layers of one."""
    return (
        "No coordinator here offers a model, and no worker holds layers of one.\n"
        f"  to offer one:  azu-coordinator serve --bootstrap {bootstrap[0]} --model PATH_OR_HUB_ID"
    )


def no_provider(digest: str) -> str:
    """Where nobody announced a manifest."""
    return (
        f"Nobody here has announced the manifest {digest}.\n"
        "  Its coordinator announces it within seconds of its start, and each worker that has layers of it.\n"
        "  to see what there is:  azu-dht models"
    )
