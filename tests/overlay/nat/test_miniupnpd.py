"""The daemon of most home routers, asked for a port."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.netlab import Home, Lab, laboratory
from tests.overlay.nat.routers import PORT, at, greets, mapper

lab = pytest.fixture(laboratory)

MINIUPNPD_TABLE = """
table inet azuigd {
    chain forward { type filter hook forward priority filter; jump miniupnpd; }
    chain miniupnpd { }
    chain prerouting { type nat hook prerouting priority dstnat; jump prerouting_miniupnpd; }
    chain postrouting { type nat hook postrouting priority srcnat - 10; jump postrouting_miniupnpd; }
    chain prerouting_miniupnpd { }
    chain postrouting_miniupnpd { }
}
"""


@contextmanager
def miniupnpd(home: Home, folder: Path, *, with_natpmp: bool) -> Iterator[None]:
    """The daemon of most home routers."""
    home.router.run(["nft", "-f", "-"], MINIUPNPD_TABLE)
    config = folder / "miniupnpd.conf"
    config.write_text(
        "ext_ifname=wan\nlistening_ip=lan\nport=0\nenable_upnp=yes\nsecure_mode=yes\nsystem_uptime=yes\n"
        f"enable_natpmp={'yes' if with_natpmp else 'no'}\n"
        "upnp_table_name=azuigd\nupnp_nat_table_name=azuigd\nupnp_forward_chain=miniupnpd\n"
        "upnp_nat_chain=prerouting_miniupnpd\nupnp_nat_postrouting_chain=postrouting_miniupnpd\n"
        "uuid=73a9cb68-a00b-4d2b-8412-3c989f2a2b28\nallow 1024-65535 0.0.0.0/0 1024-65535\n"
    )
    command = ["miniupnpd", "-d", "-f", str(config), "-P", str(folder / "pid")]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(home.router.command(command), stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 10
        while "HTTP listening" not in (folder / "log").read_text() and time.monotonic() < deadline:
            assert process.poll() is None, (folder / "log").read_text()
            time.sleep(0.05)
        yield
    finally:
        process.terminate()
        process.wait(10)


@pytest.mark.parametrize("with_natpmp", [True, False])
def test_with_miniupnpd(lab: Lab, tmp_path: Path, with_natpmp: bool) -> None:
    if shutil.which("miniupnpd") is None:
        pytest.skip("NO miniupnpd: the foreign router is not tested. apt-get install miniupnpd-nftables")
    home, stranger = lab.home(), lab.public_host()

    async def run() -> None:
        async with mapper() as mapping:
            found = await mapping.map_port(PORT)
            assert found == f"/ip4/{home.address}/tcp/{PORT}"
            assert await greets(stranger, home.address, PORT)
            assert await mapping.map_port(PORT) == found
        assert not await greets(stranger, home.address, PORT)

    with miniupnpd(home, tmp_path, with_natpmp=with_natpmp):
        at(home.hosts[0], run)
