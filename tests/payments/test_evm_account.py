from __future__ import annotations

import subprocess
import sys

HOSTILE = """
import json, sys
before = sys.getrecursionlimit()
from azu.payments.evm_account import evm_account
evm_account(bytes([1]) * 32)
assert sys.getrecursionlimit() == before
try:
    json.loads("[" * 200_000)
except RecursionError:
    print("survived")
"""


def test_deep_json_ends_no_process_that_can_pay() -> None:
    """py_ecc would have Python follow it until the stack overflows."""
    done = subprocess.run([sys.executable, "-c", HOSTILE], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (0, "survived\n"), done.stderr
