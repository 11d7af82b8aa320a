"""Models as the swarm sees them: manifests, content-addressed layer files, imports, and stages spliced out of them.

Only `splice` and `checkpoint` import torch and transformers; everything else starts fast and runs in the coordinator.
"""

from __future__ import annotations

__all__: list[str] = []
