"""Models as the swarm sees them: manifests, content-addressed layer files, imports, and stages spliced out of them.

Only what loads and runs a stage imports torch and transformers; all else starts fast and runs in the coordinator.
"""

from __future__ import annotations

import logging
import os

__all__: list[str] = []

# Where the package kernels is installed, transformers would fetch compiled code from the hub: nobody signed for that.
os.environ.setdefault("USE_HUB_KERNELS", "NO")

# Where torchao is installed, transformers imports it, and both then tell of kernels and enums that azu does not use.
for _name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)
