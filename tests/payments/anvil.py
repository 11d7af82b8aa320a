"""A real EVM chain of this machine's own, told what to do over its JSON-RPC."""

from __future__ import annotations

import json
import urllib.request
from typing import Any

from azu.payments.addresses import check_evm_address
from azu.payments.evm_account import load_eth_account
from tests.local_swarm import wait_until

load_eth_account()
from eth_account import Account  # noqa: E402 - after its loader
from eth_account.signers.local import LocalAccount  # noqa: E402

__all__ = ["CHAIN_ID", "COIN", "GAS_PRICE", "Chain", "account"]

CHAIN_ID = 998
COIN = 10**18
GAS_PRICE = 2 * 10**9


def account(number: int) -> LocalAccount:
    """A wallet of the tests; the chain knows nothing of it."""
    made: LocalAccount = Account.from_key(number.to_bytes(32, "big"))
    return made


class Chain:
    """What tests do to the chain, past the code under test. Blocking calls."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._id = 0

    def ask(self, method: str, *params: object) -> Any:
        """The result of a JSON-RPC call."""
        self._id += 1
        body = json.dumps({"jsonrpc": "2.0", "id": self._id, "method": method, "params": params}).encode()
        request = urllib.request.Request(self.url, body, {"content-type": "application/json"})  # noqa: S310
        with urllib.request.urlopen(request, timeout=60) as response:  # noqa: S310 - our own loopback URL
            answer = json.loads(response.read())
        assert "error" not in answer, answer["error"]
        return answer["result"]

    def fund(self, address: str, amount: int = 100 * COIN) -> None:
        """Let an address have this many wei."""
        self.ask("anvil_setBalance", address, hex(amount))

    def balance(self, address: str) -> int:
        """Wei at the latest block."""
        return int(self.ask("eth_getBalance", address, "latest"), 16)

    def mine(self, blocks: int = 1) -> None:
        """Make blocks of what waits."""
        self.ask("anvil_mine", hex(blocks))

    def count(self, address: str, block: str = "latest") -> int:
        """Transactions that an address has sent, at that block."""
        return int(self.ask("eth_getTransactionCount", address, block), 16)

    def transfer(
        self, sender: LocalAccount, to: str | None, value: int, *, data: str = "0x", gas: int = 100_000, nonce: int = -1
    ) -> str:
        """Send coin, and return the transaction's hash; mined soon unless the chain was told not to."""
        nonce = self.count(sender.address, "pending") if nonce < 0 else nonce  # the one before may not be mined yet
        fields: dict[str, Any] = {
            "chainId": CHAIN_ID, "nonce": nonce, "value": value,
            "gas": gas, "maxFeePerGas": GAS_PRICE, "maxPriorityFeePerGas": 0, "data": data, "type": 2,
            **({} if to is None else {"to": check_evm_address(to)}),
        }  # fmt: skip
        raw = bytes(sender.sign_transaction(fields).raw_transaction)
        return str(self.ask("eth_sendRawTransaction", f"0x{raw.hex()}"))

    def deploy(self, sender: LocalAccount, code: str) -> str:
        """Put a contract of that runtime code (hex, up to 255 bytes) onto the chain, and return its address."""
        size = len(code) // 2
        # PUSH1 size, DUP1, PUSH1 11, PUSH1 0, CODECOPY, PUSH1 0, RETURN
        start = f"60{size:02x}80600b6000396000f3"
        txid = self.transfer(sender, None, 0, data=f"0x{start}{code}", gas=500_000)
        receipt = wait_until(lambda: self.ask("eth_getTransactionReceipt", txid), "the receipt, which may lag")
        return str(receipt["contractAddress"])
