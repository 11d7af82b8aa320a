from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from solders.keypair import Keypair

from azu.errors import InputError
from azu.payments.addresses import check_evm_address, check_payout_address, check_solana_address
from azu.payments.evm_account import evm_account

ANN = "0x5aAeb6053F3E94C9b9A09f33669435E7Ef1BeAed"  # EIP-55's own example
SOL = "4uhcVJyU9pJkvQyS88uRDiswHXSCkY3zQawwpjk2NsNY"


@pytest.mark.parametrize("text", [ANN, ANN.lower(), "0x" + ANN[2:].upper()])
def test_an_evm_address_gets_its_checksum(text: str) -> None:
    assert check_evm_address(text) == check_payout_address(text) == ANN


@given(st.binary(min_size=32, max_size=32).filter(lambda key: 0 < int.from_bytes(key, "big") < 2**255))
def test_the_checksum_is_that_of_eth_account(key: bytes) -> None:
    address = evm_account(key).address
    assert check_evm_address(address.lower()) == address


@given(st.binary(min_size=32, max_size=32))
def test_solanas_addresses_are_taken(seed: bytes) -> None:
    address = str(Keypair.from_seed(seed).pubkey())
    assert check_solana_address(address) == check_payout_address(address) == address


@pytest.mark.parametrize(
    "text",
    ["", "0x", ANN[:-1], ANN + "0", ANN[2:], ANN.replace("5a", "5A"), "0x" + "0" * 40, "0x" + "g" * 40, ANN + "\n",
     "0x" + "٣" * 40, SOL + " ", SOL[:-4], SOL + "1", "O" + SOL[1:], "1" * 32, "é" * 40, "1" * 5000, "me"],
)  # fmt: skip
def test_other_text_is_refused(text: str) -> None:
    with pytest.raises(InputError) as caught:
        check_payout_address(text)
    assert caught.value.code == "bad_address"
    assert len(str(caught.value)) < 300
