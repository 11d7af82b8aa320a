"""The hub's side of publishing, with the real huggingface_hub against a hub on loopback."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from azu.errors import AzuError, InputError, InternalError, ModelError, NetworkError, TrustError
from azu.models import hub_cache
from azu.models.hub_headers import read_hub
from azu.models.manifest import Manifest
from azu.models.progress import Progress
from azu.models.publish import publish, publish_from_hub
from azu.models.store import LayerStore
from tests.loopback_hub import LoopbackHub, sharded_llama

FILES = sharded_llama()
SHARDS = sorted(name for name in FILES if name.endswith(".safetensors"))
INDEX = "model.safetensors.index.json"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    """A hub with me/tiny, which this process takes for the only one; variables would be read at import only."""
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(hub_cache, "_PAUSES", (0.0, 0.0))
    with LoopbackHub() as made:
        settings: dict[str, Any] = {"ENDPOINT": made.url, "HF_HUB_OFFLINE": False, "HF_HUB_CACHE": str(cache(tmp_path))}
        settings |= {"HUGGINGFACE_CO_URL_TEMPLATE": f"{made.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"}
        settings |= {"HF_TOKEN_PATH": str(tmp_path / "token"), "AGENT_HARNESSES_PATH": str(tmp_path / "agents.json")}
        for name, value in settings.items():
            monkeypatch.setattr(constants, name, value)
        made.add("me/tiny", FILES)
        yield made


def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def cached_names(tmp_path: Path) -> set[str]:
    """The names of all files in the cache's snapshots."""
    return {path.name for path in cache(tmp_path).rglob("snapshots/*/*")}


def refused(source: str, store: LayerStore, kind: type[AzuError]) -> AzuError:
    with pytest.raises(kind) as caught:
        publish(source, store)
    assert caught.value.message
    assert caught.value.remedy
    assert store.digests() == set()
    return caught.value


def test_a_sharded_repository(hub: LoopbackHub, store: LayerStore, tmp_path: Path) -> None:
    extra = {"pytorch_model.bin": b"\x80\x04", "consolidated.safetensors": b"no", "flax_model.msgpack": b"no"}
    commit = hub.add("me/tiny", {**FILES, **extra})
    steps: list[Progress] = []
    manifest = publish("me/tiny", store, report=steps.append)
    assert (manifest.model_id, manifest.origin, manifest.revision) == ("me/tiny", "me/tiny", commit)
    wanted = FILES.keys() - {"README.md"}
    assert manifest.sources.keys() == wanted == cached_names(tmp_path)
    assert {asked.name for asked in hub.asked} - {""} == wanted
    assert len(manifest.layers) == 6
    assert manifest.tokenizer.keys() == {"tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    whole = sum(len(FILES[name]) for name in wanted)
    assert list(dict.fromkeys(step.stage for step in steps)) == ["downloading", "verifying", "cutting"]
    assert Progress("downloading", SHARDS[-1], whole, whole) in steps
    assert Progress("verifying", SHARDS[-1], whole, whole) in steps
    (tmp_path / "folder").mkdir()
    for name in wanted:
        (tmp_path / "folder" / name).write_bytes(FILES[name])
    local = publish(str(tmp_path / "folder"), LayerStore(tmp_path / "other"))
    assert (local.layers, local.shared, local.sources) == (manifest.layers, manifest.shared, manifest.sources)


def test_an_unchanged_revision_is_not_touched(hub: LoopbackHub, store: LayerStore, tmp_path: Path) -> None:
    first = publish("me/tiny", store)
    for blob in cache(tmp_path).rglob("blobs/*"):
        blob.unlink()  # nothing of the source is needed
    before = len(hub.asked)
    assert publish("me/tiny", store, report=lambda _: pytest.fail("it worked again")) == first
    assert len(hub.asked) == before + 1


def test_revisions(hub: LoopbackHub, store: LayerStore) -> None:
    commit = hub.add("me/tiny", {**FILES, "tokenizer.json": b"{}"}, ref="v2")
    assert publish("me/tiny@v2", store).revision == commit == publish(f"me/tiny@{commit}", store).revision
    assert publish("me/tiny", store).revision != commit


def test_a_broken_connection_is_taken_up_where_it_broke(hub: LoopbackHub, store: LayerStore) -> None:
    hub.cut_after[SHARDS[1]] = 100_000
    publish("me/tiny", store)
    first, second = hub.of(SHARDS[1])
    assert (first.range_start, first.sent) == (None, 100_000)
    assert (second.range_start, second.sent) == (100_000, len(FILES[SHARDS[1]]) - 100_000)


def test_what_came_before_an_end_is_not_fetched_again(hub: LoopbackHub, store: LayerStore) -> None:
    def stop(progress: Progress) -> None:
        if progress.stage == "downloading" and progress.done > len(FILES[SHARDS[0]]) + 100_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        publish("me/tiny", store, report=stop)
    before = len(hub.asked)
    steps: list[Progress] = []
    publish("me/tiny", store, report=steps.append)
    again = [asked for asked in hub.asked[before:] if asked.name]
    assert [asked.name for asked in again] == SHARDS[1:]
    assert (again[0].range_start or 0) > 0
    downloading = [step for step in steps if step.stage == "downloading" and step.total > 500_000]
    assert downloading[0].done >= len(FILES[SHARDS[0]]), "what was here is no news, and would count into the rate"
    assert downloading[-1].done == downloading[-1].total


def test_a_hub_that_goes_away(hub: LoopbackHub, store: LayerStore, tmp_path: Path) -> None:
    def lose_it(progress: Progress) -> None:
        if progress.item == SHARDS[1]:
            hub.status = 503

    with pytest.raises(NetworkError, match="status 503") as caught:
        publish("me/tiny", store, report=lose_it)
    assert caught.value.code == "hub_unreachable"
    assert len([asked for asked in hub.asked if asked.path.endswith(SHARDS[2])]) == 0
    assert refused("me/other", store, NetworkError).code == "hub_unreachable"
    # What it said of me/tiny before still counts, so that it is the files that are missed.
    assert refused("me/tiny", store, NetworkError).code == "hub_unreachable"
    hub.status = None
    assert publish("me/tiny", store).model_id == "me/tiny"


def test_offline(hub: LoopbackHub, store: LayerStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert refused("me/tiny", store, NetworkError).code == "hub_unreachable"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    manifest = publish("me/tiny", LayerStore(tmp_path / "other"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    before = len(hub.asked)
    assert publish("me/tiny", store) == manifest
    assert len(hub.asked) == before


@pytest.mark.parametrize("name", [SHARDS[2], "tokenizer.json"])
def test_a_wrong_byte(hub: LoopbackHub, store: LayerStore, name: str) -> None:
    hub.wrong.add(name)
    error = refused("me/tiny", store, TrustError)
    assert error.code == "digest_mismatch"
    assert name in error.message
    hub.wrong.clear()
    before = len(hub.asked)
    publish("me/tiny", store)
    assert [asked.name for asked in hub.asked[before:] if asked.name] == [name]


def test_a_wrong_byte_in_the_cache(hub: LoopbackHub, store: LayerStore, tmp_path: Path) -> None:
    """Whoever put it there: the cache's name for it proves nothing."""
    publish("me/tiny", LayerStore(tmp_path / "other"))
    (link,) = cache(tmp_path).rglob(f"snapshots/*/{SHARDS[0]}")
    link.resolve().write_bytes(FILES[SHARDS[0]][:-1] + b"!")
    assert refused("me/tiny", store, TrustError).code == "digest_mismatch"
    assert not link.exists()
    publish("me/tiny", store)


@pytest.mark.parametrize("change", [-1, 1])
def test_a_wrong_size(hub: LoopbackHub, store: LayerStore, tmp_path: Path, change: int) -> None:
    hub.sizes[SHARDS[0]] = len(FILES[SHARDS[0]]) + change
    assert refused("me/tiny", store, TrustError).code == "size_mismatch"
    assert list(cache(tmp_path).rglob("*.incomplete")) == []


def test_nothing_is_unpacked(hub: LoopbackHub, store: LayerStore) -> None:
    """A packed megabyte may be a gigabyte: files count as they come, and their digests are those of what comes."""
    hub.encoding = "gzip"
    assert len(publish("me/tiny", store).layers) == 6
    assert len(read_hub("me/tiny")[2]) > 6


def test_access(hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = LayerStore(tmp_path / "store")
    hub.add("me/gated", FILES, gated=True, tokens=["good-token"])
    hub.add("me/private", FILES, private=True, tokens=["good-token"])
    assert refused("me/gated", store, InputError).code == "gated_model"
    assert refused("me/private", store, InputError).code == "unknown_model"
    monkeypatch.setenv("HF_TOKEN", "bad-token")
    assert refused("me/gated", store, InputError).code == "gated_model"
    assert list(cache(tmp_path).rglob("*.incomplete")) == []
    hub.status = 403
    assert refused("me/tiny", store, InputError).code == "hub_refused"
    hub.status = None
    monkeypatch.setenv("HF_TOKEN", "good-token")
    assert publish("me/gated", store).model_id == "me/gated"
    assert publish("me/private", store).model_id == "me/private"


def test_what_is_not_there(hub: LoopbackHub, store: LayerStore) -> None:
    assert refused("me/other", store, InputError).code == "unknown_model"
    assert refused("me/tiny@other", store, InputError).code == "unknown_revision"
    for bad in ("me/tiny@../x", "me/tiny@/etc/x", "../x/y", "a/b/c", "me/tiny@", "mé/tiny", "me/tiny\n"):
        with pytest.raises(InputError) as caught:
            publish_from_hub(bad, store)
        assert caught.value.code == "bad_source"


CONFIG = json.loads(FILES["config.json"])


def without(*names: str, **changed: bytes) -> dict[str, bytes]:
    return {name: data for name, data in FILES.items() if name not in names}


def config(**changes: object) -> dict[str, bytes]:
    return {**FILES, "config.json": json.dumps({**CONFIG, **changes}).encode()}


def index(shard: str) -> dict[str, bytes]:
    return {**FILES, INDEX: json.dumps({"weight_map": {"model.norm.weight": shard}}).encode()}


@pytest.mark.parametrize(
    ("files", "code"),
    [
        (without("config.json"), "no_config"),
        ({"config.json": FILES["config.json"], "pytorch_model.bin": b"\x80", "x.pt": b"\x80"}, "unsafe_weights"),
        ({"config.json": FILES["config.json"], "README.md": b""}, "no_weights"),
        (config(architectures=["T5ForConditionalGeneration"]), "unsupported_architecture"),
        (config(architectures=["BertModel"]), "unsupported_architecture"),
        (config(architectures=["MambaForCausalLM"], model_type="mamba"), "unsupported_architecture"),
        (config(is_encoder_decoder=True), "unsupported_architecture"),
        (config(quantization_config={"quant_method": "gptq"}), "unsupported_quantization"),
        (config(num_hidden_layers=10**9), "bad_config"),
        ({**FILES, "config.json": b"["}, "bad_json"),
        (index("../model.safetensors"), "bad_index"),
        (index("/etc/passwd.safetensors"), "bad_index"),
        (index("pytorch_model.bin"), "bad_index"),
        (index("model-00009-of-00009.safetensors"), "bad_index"),
        ({**FILES, INDEX: b"{}"}, "bad_index"),
    ],
)
def test_what_is_refused_before_any_weight_is_fetched(
    hub: LoopbackHub, store: LayerStore, tmp_path: Path, files: dict[str, bytes], code: str
) -> None:
    hub.add("me/bad", files)
    assert refused("me/bad", store, ModelError).code == code
    assert {asked.name for asked in hub.asked} <= {"", "config.json", INDEX}
    assert cached_names(tmp_path) <= {"config.json", INDEX}


def test_no_room_is_known_before(hub: LoopbackHub, store: LayerStore) -> None:
    hub.sizes[SHARDS[0]] = 1 << 60
    error = refused("me/tiny", store, InternalError)
    assert error.code == "storage"
    assert "disk is too small" in error.message
    assert hub.of(SHARDS[0]) == []


def test_a_disk_that_fills_up(hub: LoopbackHub, store: LayerStore, tmp_path: Path) -> None:
    def fill(progress: Progress) -> None:
        if progress.item == SHARDS[1] and progress.done > len(FILES[SHARDS[0]]) + 100_000:
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(InternalError) as caught:
        publish("me/tiny", store, report=fill)
    assert caught.value.code == "storage"
    assert "HF_HOME" in caught.value.remedy
    assert list(cache(tmp_path).rglob("*.incomplete")) == []
    assert publish("me/tiny", store).model_id == "me/tiny"


def test_two_at_once_fetch_it_once(hub: LoopbackHub, tmp_path: Path) -> None:
    """Two processes, say; the lock is on the open file, so that two threads show it too."""
    import threading

    hub.rate = 2_000_000
    found: list[Manifest] = []
    stores = [LayerStore(tmp_path / name) for name in ("one", "two")]
    threads = [threading.Thread(target=lambda s=s: found.append(publish("me/tiny", s))) for s in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len({manifest.digest for manifest in found}) == 1
    assert len(found) == 2
    assert [hub.sent(name) for name in SHARDS] == [len(FILES[name]) for name in SHARDS]


def test_what_answers_is_no_hub(hub: LoopbackHub, store: LayerStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert refused("me/tiny", store, NetworkError).code == "hub_unreachable"
    monkeypatch.setattr(constants, "ENDPOINT", "no url")
    assert refused("me/tiny", store, NetworkError).code == "hub_unreachable"
