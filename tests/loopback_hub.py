"""huggingface.co on loopback: what the real huggingface_hub client asks for, over real HTTP, with faults on demand.

    with LoopbackHub() as hub:
        commit = hub.add("me/tiny", {"config.json": b"{}", "model.safetensors": b"..."})
        subprocess.run(..., env={**os.environ, **hub.environment(tmp_path)})

Routes: /api/models/ID[/revision/REV] (with ?blobs=true sizes and digests, as `model_info(files_metadata=True)` asks),
/ID/resolve/REV/FILE, which sends the file itself, or a redirect to /cdn/... for a file in LFS (any `*.safetensors` and
whatever is named in `lfs`), as the hub does. Both honour Range.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import threading
import time
import zlib
from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qs, unquote, urlsplit

from azu.models.safetensors_file import TensorSpec, serialize

__all__ = ["Asked", "LoopbackHub", "Repo", "git_sha1", "read_folder", "sharded_llama"]

_CHUNK = 16_384  # bytes sent between two looks at the clock


@dataclass(slots=True)
class Asked:
    """One request: the file's name ("" where it was for none), its Range, and how many bytes were sent so far."""

    method: str
    path: str
    authorized: bool
    name: str = ""
    range_start: int | None = None
    sent: int = 0


@dataclass
class Repo:
    """A repository; `commits` maps each commit to its files, `refs` branches and tags to commits."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    lfs: frozenset[str] = frozenset()
    private: bool = False
    gated: bool = False
    tokens: frozenset[str] = frozenset()

    def is_lfs(self, name: str) -> bool:
        return name.endswith(".safetensors") or name in self.lfs

    def digest(self, name: str, data: bytes) -> str:
        """What the hub announces and sends as ETag."""
        return hashlib.sha256(data).hexdigest() if self.is_lfs(name) else git_sha1(data)


class LoopbackHub:
    """The server; its attributes are the faults, and may be changed while it runs.

    Attributes:
        cut_after: file name to the bytes after which its connection breaks; each entry works once.
        wrong: names of files that are sent with one bit flipped.
        sizes: file name to a size that is announced instead of the true one.
        rate: bytes per second of each connection; None sends as fast as it can.
        status: answered to everything, where set.
        encoding: the Content-Encoding that files claim to have, whatever was asked for.
        asked: all requests so far, in the order in which they came.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.cut_after: dict[str, int] = {}
        self.wrong: set[str] = set()
        self.sizes: dict[str, int] = {}
        self.rate: float | None = None
        self.status: int | None = None
        self.encoding: str | None = None
        self.asked: list[Asked] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.daemon_threads = True
        self._server.hub = self  # type: ignore[attr-defined]
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(10)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def environment(self, home: Path, token: str | None = None) -> dict[str, str]:
        """Variables for a process that shall take this for the hub, over those of the machine."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_HUB_OFFLINE": "0",
            "HF_TOKEN": token or "",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }

    def add(
        self,
        repo_id: str,
        files: Mapping[str, bytes],
        *,
        ref: str = "main",
        lfs: Iterable[str] = (),
        private: bool = False,
        gated: bool = False,
        tokens: Iterable[str] = (),
    ) -> str:
        """Add a commit to a repository, point `ref` at it, and return it. `tokens` are those that may read it."""
        repo = self.repos.setdefault(repo_id, Repo())
        repo.lfs, repo.private, repo.gated, repo.tokens = frozenset(lfs), private, gated, frozenset(tokens)
        listing = sorted((name, hashlib.sha256(data).hexdigest()) for name, data in files.items())
        commit = hashlib.sha1(json.dumps(listing).encode()).hexdigest()  # noqa: S324 - as git names commits
        repo.commits[commit] = dict(files)
        repo.refs[ref] = commit
        return commit

    def of(self, name: str, method: str = "GET") -> list[Asked]:
        """The requests for one file that sent bytes or a refusal, redirects left out."""
        return [asked for asked in self.asked if asked.name == name and asked.method == method]

    def sent(self, name: str) -> int:
        """How many bytes of a file went out, over all requests."""
        return sum(asked.sent for asked in self.of(name))


def read_folder(folder: Path) -> dict[str, bytes]:
    """The files of a folder, for `LoopbackHub.add`."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def git_sha1(data: bytes) -> str:
    """Git's name of a blob with that content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()  # noqa: S324 - git's own


def sharded_llama(n_layers: int = 6, hidden: int = 64, shards: int = 3) -> dict[str, bytes]:
    """A Llama of random float32 weights as the hub has large ones: an index, shards, a tokenizer's files; no torch."""
    chance = random.Random(0)
    noise = array("f", (chance.gauss(0, 0.02) for _ in range(4096))).tobytes()
    config: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden}
    config |= {"num_hidden_layers": n_layers, "num_attention_heads": 4, "intermediate_size": hidden, "vocab_size": 64}
    config |= {"max_position_embeddings": 64, "tie_word_embeddings": False, "rms_norm_eps": 1e-5, "dtype": "float32"}
    specs = [TensorSpec(name, "F32", (64, hidden)) for name in ("model.embed_tokens.weight", "lm_head.weight")]
    specs.append(TensorSpec("model.norm.weight", "F32", (hidden,)))
    for layer in (f"model.layers.{index}" for index in range(n_layers)):
        square = [f"self_attn.{part}_proj" for part in "qkvo"] + [f"mlp.{part}_proj" for part in ("gate", "up", "down")]
        specs += [TensorSpec(f"{layer}.{name}.weight", "F32", (hidden, hidden)) for name in square]
        norms = ("input_layernorm", "post_attention_layernorm")
        specs += [TensorSpec(f"{layer}.{name}.weight", "F32", (hidden,)) for name in norms]

    def weights(name: str) -> Iterator[bytes]:  # the same noise, begun elsewhere for each tensor
        (spec,) = (spec for spec in specs if spec.name == name)
        begin = 4 * (zlib.crc32(name.encode()) % 4096)
        yield ((noise[begin:] + noise[:begin]) * (spec.nbytes // len(noise) + 1))[: spec.nbytes]

    files = {"config.json": json.dumps(config).encode(), "generation_config.json": b'{"eos_token_id": 2}'}
    files |= {"tokenizer.json": b'{"version": "1.0"}', "tokenizer_config.json": b"{}", "README.md": b"# a model"}
    weight_map: dict[str, str] = {}
    for number in range(shards):
        name, part = f"model-{number + 1:05}-of-{shards:05}.safetensors", specs[number::shards]
        files[name] = b"".join(serialize(part, weights))
        weight_map |= {spec.name: name for spec in part}
    files["model.safetensors.index.json"] = json.dumps({"weight_map": weight_map}).encode()
    return files


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = 0
    _asked: Asked

    @property
    def _hub(self) -> LoopbackHub:
        hub: LoopbackHub = self.server.hub  # type: ignore[attr-defined]
        return hub

    def do_GET(self) -> None:
        self._asked = Asked(self.command, self.path, "Authorization" in self.headers)
        self._hub.asked.append(self._asked)
        try:
            self._route()
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    do_HEAD = do_GET

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class names it so
        """Quiet: `asked` is the log."""

    def _route(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if self._hub.status is not None:
            self._answer(self._hub.status, {}, b"out of order")
        elif match := re.fullmatch(r"/api/models/(.+?)(?:/revision/(.+))?", path):
            self._info(match[1], match[2] or "main")
        elif match := re.fullmatch(r"/cdn/(.+)/([0-9a-f]{40})/([^/]+)", path):
            self._file(self._hub.repos[match[1]], match[2], match[3])
        elif match := re.fullmatch(r"/(.+?)/resolve/([^/]+)/(.+)", path):
            self._resolve(match[1], match[2], match[3])
        else:
            self._refuse(HTTPStatus.NOT_FOUND, "EntryNotFound")

    def _find(self, repo_id: str, revision: str) -> tuple[Repo, str] | None:
        repo = self._hub.repos.get(repo_id)
        if repo is None or (repo.private and not self._may_read(repo)):
            # As the hub does: to a stranger a private repository looks like one that does not exist.
            self._refuse(HTTPStatus.NOT_FOUND if "Authorization" in self.headers else 401, "RepoNotFound")
            return None
        commit = repo.refs.get(revision, revision)
        if commit not in repo.commits:
            self._refuse(HTTPStatus.NOT_FOUND, "RevisionNotFound")
            return None
        return repo, commit

    def _may_read(self, repo: Repo) -> bool:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ") in repo.tokens

    def _info(self, repo_id: str, revision: str) -> None:
        found = self._find(repo_id, revision)
        if found is None:
            return
        repo, commit = found
        blobs = "blobs" in parse_qs(urlsplit(self.path).query)
        siblings = [self._sibling(repo, name, data, blobs) for name, data in repo.commits[commit].items()]
        info = {"id": repo_id, "modelId": repo_id, "sha": commit, "private": repo.private, "siblings": siblings}
        info |= {"gated": "manual" if repo.gated else False, "tags": [], "downloads": 0, "likes": 0}
        self._answer(HTTPStatus.OK, {"Content-Type": "application/json"}, json.dumps(info).encode())

    def _sibling(self, repo: Repo, name: str, data: bytes, blobs: bool) -> dict[str, Any]:
        if not blobs:
            return {"rfilename": name}
        size = self._hub.sizes.get(name, len(data))
        entry: dict[str, Any] = {"rfilename": name, "size": size, "blobId": git_sha1(data)}
        if repo.is_lfs(name):
            entry["lfs"] = {"sha256": repo.digest(name, data), "size": size, "pointerSize": 134}
        return entry

    def _resolve(self, repo_id: str, revision: str, name: str) -> None:
        found = self._find(repo_id, revision)
        if found is None:
            return
        repo, commit = found
        if repo.gated and not self._may_read(repo):
            self._asked.name = name
            self._refuse(HTTPStatus.FORBIDDEN if "Authorization" in self.headers else 401, "GatedRepo")
        elif name not in repo.commits[commit]:
            self._refuse(HTTPStatus.NOT_FOUND, "EntryNotFound")
        elif repo.is_lfs(name):
            data = repo.commits[commit][name]
            headers = {"Location": f"{self._hub.url}/cdn/{repo_id}/{commit}/{name}", "X-Repo-Commit": commit}
            headers |= {"X-Linked-Etag": f'"{repo.digest(name, data)}"', "X-Linked-Size": str(len(data))}
            self._answer(HTTPStatus.FOUND, headers, b"")
        else:
            self._file(repo, commit, name)

    def _file(self, repo: Repo, commit: str, name: str) -> None:
        self._asked.name = name
        data = repo.commits[commit][name]
        headers = {"ETag": f'"{repo.digest(name, data)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if self._hub.encoding is not None:
            headers["Content-Encoding"] = self._hub.encoding
        if name in self._hub.wrong:
            data = data[:-1] + bytes([data[-1] ^ 1])
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if match is None:
            self._answer(HTTPStatus.OK, headers, data)
            return
        begin = self._asked.range_start = int(match[1])
        end = min(int(match[2]) + 1 if match[2] else len(data), len(data))
        if begin >= end:
            headers["Content-Range"] = f"bytes */{len(data)}"
            self._answer(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, headers, b"")
            return
        headers["Content-Range"] = f"bytes {begin}-{end - 1}/{len(data)}"
        self._answer(HTTPStatus.PARTIAL_CONTENT, headers, data[begin:end])

    def _refuse(self, status: int, code: str) -> None:
        self._answer(status, {"X-Error-Code": code, "X-Error-Message": code}, json.dumps({"error": code}).encode())

    def _answer(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self._send(body)

    def _send(self, body: bytes) -> None:
        asked = self._asked
        limit = self._hub.cut_after.pop(asked.name, None) if asked.name else None
        end = len(body) if limit is None else min(limit, len(body))
        started = time.monotonic()
        while asked.sent < end:
            part = body[asked.sent : min(asked.sent + _CHUNK, end)]
            asked.sent += len(part)  # before the client may have it and look here
            self.wfile.write(part)
            if self._hub.rate is not None and asked.name:
                time.sleep(max(0.0, started + asked.sent / self._hub.rate - time.monotonic()))
        if end < len(body):
            self.close_connection = True
