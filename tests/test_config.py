from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from azu.config import BootstrapSettings, CoordinatorSettings, DhtSettings, NodeSettings, format_size, parse_size
from azu.errors import InputError
from azu.operator_input import check_device, check_multiaddr, check_peer_address, check_peer_id

ALL = [NodeSettings, CoordinatorSettings, BootstrapSettings, DhtSettings]
PEER = "12D3KooWPjceQrSwdWXPyLLeABRXmuqt69Rg3sBYbU1Nft9HyQ6X"
BOOTSTRAP = f"/ip4/127.0.0.1/tcp/4001/p2p/{PEER}"


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import os

    for name in [name for name in os.environ if name.startswith("AZU_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("settings", ALL)
def test_defaults_are_valid_and_taught(settings: type) -> None:
    settings()
    assert all(len(field.description or "") > 20 for field in settings.model_fields.values())


def test_defaults() -> None:
    node, coordinator = NodeSettings(), CoordinatorSettings()
    assert (node.device, node.dtype, node.vram, node.threads) == ("auto", "auto", None, None)
    assert node.data_dir == Path.home() / ".azu/node"
    assert (coordinator.host, coordinator.port, coordinator.default_max_tokens) == ("127.0.0.1", 8000, 1024)
    assert BootstrapSettings().listen == ("/ip4/0.0.0.0/tcp/4001",)


def test_given_beats_variable_beats_file_beats_default(monkeypatch: pytest.MonkeyPatch) -> None:
    Path(".env").write_text("AZU_VRAM=1GiB\nAZU_DEVICE=cuda:1\nAZU_THREADS=7\nAZU_OTHER=ignored\nNOT_OURS=1\n")
    monkeypatch.setenv("AZU_VRAM", "2GiB")
    monkeypatch.setenv("AZU_DEVICE", "cuda:2")
    settings = NodeSettings(vram="3GiB")
    assert (settings.vram, settings.device, settings.threads, settings.dtype) == (3 * 1024**3, "cuda:2", 7, "auto")


def test_lists_in_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZU_MODELS", "one, two three")
    monkeypatch.setenv("AZU_BOOTSTRAP", BOOTSTRAP)
    settings = CoordinatorSettings()
    assert settings.models == ("one", "two", "three")
    assert settings.bootstrap == (BOOTSTRAP,)


def test_an_empty_variable_counts_as_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZU_VRAM", "")
    assert NodeSettings().vram is None


@pytest.mark.parametrize(
    "bad",
    [
        {"vram": "lots"},
        {"vram": 0},
        {"device": "gpu"},
        {"dtype": "int2"},
        {"threads": 0},
        {"threads": -1},
        {"bootstrap": ("127.0.0.1:4001",)},
        {"bootstrap": ("/ip4/127.0.0.1/tcp/4001",)},
        {"trust": ("me",)},
        {"log_level": "loud"},
        {"payout_address": ""},
    ],
    ids=str,
)
def test_bad_values_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(ValidationError) as caught:
        NodeSettings(**bad)
    assert caught.value.errors()[0]["loc"][0] in bad


def test_settings_are_frozen() -> None:
    with pytest.raises(ValidationError):
        NodeSettings().device = "cpu"


# --- sizes ---


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("8GiB", 8 * 1024**3),
        ("8 gib", 8 * 1024**3),
        ("8G", 8 * 1024**3),
        ("1.5GiB", 3 * 1024**3 // 2),
        ("500MB", 500_000_000),
        ("2tb", 2 * 10**12),
        ("1KiB", 1024),
        ("4096", 4096),
        ("4096B", 4096),
        (4096, 4096),
    ],
)
def test_parse_size(text: str | int, size: int) -> None:
    assert parse_size(text) == size


BAD_SIZES = [
    "",
    "GiB",
    "-1",
    "0",
    "0GiB",
    "1e9",
    "8 G i B",
    "8GiBs",
    "nan",
    "٣",
    "9" * 19,
    "99999999TiB",
    "0.1",
    -5,
    True,
    "1.5.5G",
]


@pytest.mark.parametrize("text", BAD_SIZES)
def test_parse_size_refuses(text: str | int) -> None:
    with pytest.raises(InputError) as caught:
        parse_size(text)
    assert "8GiB" in caught.value.remedy
    assert "500MB" in caught.value.remedy


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (512, "512 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (8053063680, "7.5 GiB"),
        (1024**2 - 1, "1.0 MiB"),
        (5000 * 1024**4, "5000.0 TiB"),
        (-2048, "-2.0 KiB"),
    ],
)
def test_format_size(size: int, text: str) -> None:
    assert format_size(size) == text


@given(st.integers(1, 2**62))
def test_a_formatted_size_parses_to_about_itself(size: int) -> None:
    assert abs(parse_size(format_size(size)) - size) <= size * 0.05


# --- what an operator types ---

GOOD_ADDRESSES = [
    "/ip4/0.0.0.0/tcp/0",
    "/ip6/::1/tcp/65535",
    "/dns4/swarm.example.org/tcp/443/tls/ws",
    "/ip4/1.2.3.4/udp/4001/quic-v1",
    BOOTSTRAP,
    f"{BOOTSTRAP}/p2p-circuit/p2p/{PEER}",
    "/ip4/1.2.3.4/tcp/1/p2p/QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N",
]
BAD_ADDRESSES = [
    "",
    "/",
    "//",
    "foo",
    "127.0.0.1:4001",
    "http://127.0.0.1:4001",
    "/ip4",
    "/ip4/",
    "/ip4/127.0.0.1/tcp",
    "/ip4/300.0.0.1/tcp/1",
    "/ip4/127.0.0.1/tcp/65536",
    "/ip4/127.0.0.1/tcp/-1",
    "/ip4/127.0.0.1/tcp/1/",
    "/ip4/127.0.0.1/tcp/1/p2p/me",
    "/ip4/127.0.0.1/teapot/1",
    "/dns4/ /tcp/1",
    "/ip4/127.0.0.1" + "/tcp/1" * 200,
]


@pytest.mark.parametrize("text", GOOD_ADDRESSES)
def test_good_addresses(text: str) -> None:
    assert check_multiaddr(text) == text


@pytest.mark.parametrize("text", BAD_ADDRESSES)
def test_bad_addresses(text: str) -> None:
    with pytest.raises(InputError) as caught:
        check_multiaddr(text)
    assert "/ip4/203.0.113.7/tcp/4001" in caught.value.remedy
    assert len(str(caught.value)) < 400


@given(st.text())
def test_any_text_is_accepted_or_refused(text: str) -> None:
    for check in (check_multiaddr, check_peer_address, check_peer_id, check_device):
        try:
            assert check(text) == text
        except InputError as error:
            assert error.remedy  # noqa: PT017 - either outcome is fine, a third is not
