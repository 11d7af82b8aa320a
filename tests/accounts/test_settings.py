"""A coordinator's settings of accounts: names old and new, and values that cannot be."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from azu.accounts.settings import check_public_url
from azu.config import CoordinatorSettings
from azu.economics import MAX_PRICE
from azu.errors import InputError


@pytest.mark.parametrize("name", ["AZU_AUTH_MODE", "AUTH_MODE"])
def test_the_mode_has_two_names(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert CoordinatorSettings().auth_mode is None
    monkeypatch.setenv(name, "open")
    assert CoordinatorSettings().auth_mode == "open"
    assert CoordinatorSettings(auth_mode="keys").auth_mode == "keys"


@pytest.mark.parametrize("price", [0, -1, 1.5, "1e9", MAX_PRICE + 1])
def test_prices_that_cannot_be(price: object) -> None:
    with pytest.raises(ValidationError):
        CoordinatorSettings(price_per_token_layer=price)  # type: ignore[arg-type]


def test_a_price_is_read_to_the_last_digit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZU_PRICE_PER_TOKEN_LAYER", str(MAX_PRICE))
    assert CoordinatorSettings().price_per_token_layer == MAX_PRICE


@pytest.mark.parametrize(
    "url", ["https://azu.example.org", "http://127.0.0.1:8000", "https://[::1]:8443", "https://azu.example.org/"]
)
def test_public_urls(url: str) -> None:
    assert check_public_url(url) == url.removesuffix("/")


@pytest.mark.parametrize(
    "url",
    [
        "azu.example.org",
        "ftp://azu.example.org",
        "https://",
        "https://azu.example.org/path",
        "https://azu.example.org?x",
        "https://user@azu.example.org",
        "https://azu.example.org:99999",
        "https://azu.example.org:x",
        "https://azu example.org",
        "https://azü.example.org",
        f"https://{'a' * 300}.org",
        "HTTPS://azu.example.org",
    ],
)
def test_what_is_no_public_url(url: str) -> None:
    with pytest.raises(InputError) as caught:
        check_public_url(url)
    assert caught.value.code == "bad_url"


@given(st.text())
def test_any_text_is_no_fault(text: str) -> None:
    try:
        assert check_public_url(text).startswith("http")
    except InputError as error:
        assert error.remedy  # noqa: PT017 - either is fine
