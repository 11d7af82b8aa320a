"""How manifests and layer files get from who has them to who needs them: /azu/layers/1, both ends.

A file is named by its SHA-256 and made of pieces that are verified one by one, so it does not matter who sends them.
A manifest comes in its publisher's signed envelope.

    library     what a node has on disk          offenders   who sent wrong bytes
    serving     the holding side, in limits      pace        bytes per second
    fetching    the needing side                 schedule    which piece to ask of whom (pure)
    holder      its talk with one peer           patience    how long it waits for what
    buffers     what pieces come in
    manifests   fetching manifests               progress    how far it is
    fallback    files that no peer has, from the hub
"""

from azu.distribution.fallback import hub_fallback
from azu.distribution.fetching import fetch_blobs
from azu.distribution.library import Library, open_manifest
from azu.distribution.manifests import fetch_manifest
from azu.distribution.offenders import Offenders
from azu.distribution.patience import Patience
from azu.distribution.progress import FetchProgress
from azu.distribution.serving import LayerServer

__all__ = [
    "FetchProgress",
    "LayerServer",
    "Library",
    "Offenders",
    "Patience",
    "fetch_blobs",
    "fetch_manifest",
    "hub_fallback",
    "open_manifest",
]
