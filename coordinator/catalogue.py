"""Which models a coordinator serves without being told on its command line: data_dir/models.json.

`azu-coordinator shard` and POST /models/shard add to it, `azu-coordinator remove` takes away, and a running coordinator
follows its changes, whichever process makes them.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from azu.distribution import Library
from azu.durable import write_file
from azu.errors import CapacityError, InputError, InternalError
from azu.models.manifest import Manifest, is_digest
from azu.models.published import forget_unfinished, published_digests

__all__ = ["MAX_MODELS", "Catalogue", "Listed"]

MAX_MODELS = 64  # as many as a coordinator's record in the DHT can name


@dataclass(frozen=True, slots=True)
class Listed:
    """A model in the catalogue; `manifest` is its digest."""

    model_id: str
    manifest: str


class Catalogue:
    """The file; several processes may use it at once."""

    def __init__(self, data_dir: Path) -> None:
        self._path = data_dir / "models.json"

    def stamp(self) -> tuple[int, int, int] | None:
        """Something that differs after every change."""
        try:
            stat = self._path.stat()
        except OSError:
            return None
        return stat.st_ino, stat.st_mtime_ns, stat.st_size

    def models(self) -> tuple[Listed, ...]:
        """What is listed, in the order in which it was added.

        Raises:
            InputError: code "bad_catalogue", where the file is damaged.
        """
        try:
            found = tuple(Listed(**entry) for entry in json.loads(self._path.read_bytes())["models"])
            if not all(is_digest(model.manifest) and isinstance(model.model_id, str) for model in found):
                raise ValueError("a digest is malformed")
        except FileNotFoundError:
            return ()
        except (OSError, ValueError, TypeError, LookupError, RecursionError) as error:
            remedy = "Delete it, and shard the models again: what was cut is still there."
            raise InputError(f"{self._path} is damaged ({error})", code="bad_catalogue", remedy=remedy) from error
        return found

    def check_room(self, model_id: str) -> None:
        """Whether a model of that id could be listed.

        Raises:
            CapacityError: code "too_many_models". InputError: as `models`.
        """
        _check_count({model.model_id for model in self.models()} | {model_id})

    def add(self, model: Listed) -> None:
        """List a model, in the place of one of the same id; again, and a running coordinator looks at its files again.

        Raises:
            CapacityError: code "too_many_models".
        """
        with self._changing() as models:
            models[model.model_id] = model
            _check_count(models)

    def remove(self, model_id: str) -> Listed:
        """Unlist a model, and return what was listed.

        Raises:
            InputError: code "unknown_model".
        """
        if self.stamp() is None:  # nor need there be a folder
            raise _unlisted(model_id, ())
        with self._changing() as models:
            if model_id not in models:
                raise _unlisted(model_id, models)
            return models.pop(model_id)

    def free(self, library: Library, manifest: Manifest, served: Iterable[Manifest] = ()) -> int:
        """Delete a model's files that neither one that is `served` nor a listed one has too; returns the bytes freed.

        Its manifest stays: a coordinator knows by it that a worker which still has these layers loaded may be given
        others. No model is listed meanwhile: whoever lists one that shares files with this looks for them afterwards.
        """
        freed = 0
        with self._locked():
            known = dict(library.manifests())
            listed = [known[model.manifest] for model in self.models() if model.manifest in known]
            needed = {digest for other in (*served, *listed) for digest in _digests(other)}
            for digest in _digests(manifest) - needed:
                if library.store.has(digest):
                    freed += library.store.size(digest)
                    library.store.path(digest).unlink(missing_ok=True)
        return freed

    def prune(self, library: Library) -> int:
        """Delete what is no file of any model, as cuts leave it that were interrupted; returns the bytes freed.

        None may be at work.
        """
        with self._locked():
            forget_unfinished(library.store)
            models = {digest for _, manifest in library.manifests() for digest in _digests(manifest)}
            return library.store.prune(models | published_digests(library.store))

    @contextmanager
    def _changing(self) -> Iterator[dict[str, Listed]]:
        """The models by id, written back at the end."""
        with self._locked():
            models = {model.model_id: model for model in self.models()}
            yield models
            self._write(models.values())

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One process at a time."""
        try:
            with self._path.with_name("models.lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                yield
        except OSError as error:
            problem = f"{self._path} cannot be written: {error.strerror}"
            raise InternalError(problem, code="storage", remedy="Check its disk and permissions.") from error

    def _write(self, models: Iterable[Listed]) -> None:
        text = json.dumps({"models": [asdict(model) for model in models]}, indent=1)
        write_file(self._path, text.encode())


def _check_count(model_ids: Collection[str]) -> None:
    if len(model_ids) > MAX_MODELS:
        remedy = "Remove one: azu-coordinator remove MODEL_ID."
        raise CapacityError(f"{MAX_MODELS} models are listed already", code="too_many_models", remedy=remedy)


def _unlisted(model_id: str, models: Iterable[str]) -> InputError:
    known = ", ".join(models) or "none"
    return InputError(f"{model_id} is not listed", code="unknown_model", remedy=f"Listed are: {known}.")


def _digests(manifest: Manifest) -> set[str]:
    lists = (blob.piece_list for blob in manifest.blobs())
    return {blob.digest for blob in (*manifest.blobs(), *lists) if blob is not None}
