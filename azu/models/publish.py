"""Publishing: a model from a GGUF file, a directory or the hub becomes per-layer files in a store, and a manifest.

Every byte is copied as it is out of its file, and lands under its own SHA-256. Publishing is idempotent, and may be
interrupted anywhere: what was downloaded or cut is not done again (azu.models.published).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

from azu.errors import InputError, ModelError
from azu.models.directory_source import UNSAFE_SUFFIXES, open_directory
from azu.models.disk import check_space
from azu.models.inventory import outline, take_inventory, weights_of
from azu.models.judged import check_architecture
from azu.models.manifest import Blob, Manifest
from azu.models.progress import Progress, Report, silent
from azu.models.published import CutJournal, known_manifest, source_key
from azu.models.safetensors_file import serialize
from azu.models.source import ModelSource, load_json
from azu.models.store import LayerStore

__all__ = ["means_path", "open_path", "publish", "publish_from_hub"]


def publish(
    source: str,
    store: LayerStore,
    *,
    model_id: str | None = None,
    report: Report = silent,
    admit: Callable[[str], None] = lambda _: None,
) -> Manifest:
    """Imports a model into the store.

    Args:
        source: path of a .gguf file, path of a directory, or hub id as "owner/name" or "owner/name@revision".
        model_id: the name that clients will ask for; the source's own where omitted.
        report: told how far it is. No call means that the store has it already.
        admit: told the model's id before anything is downloaded or cut; what it raises ends the import.

    Raises:
        InputError: where there is no such source, it is gated, or it was changed meanwhile (code "source_changed").
        ModelError: where the model cannot be published (see the codes of the openers, `read_facts`, `find_layout`).
        NetworkError: where the hub cannot be reached.
        TrustError: where a file is not what the hub publishes.
        InternalError: code "storage", where the disk is full.
    """
    path = Path(source).expanduser()
    if not path.exists() and not means_path(source):
        return publish_from_hub(source, store, model_id=model_id, report=report, admit=admit)
    with open_path(path) as opened:
        opened = _named(opened, model_id)
        admit(opened.model_id)
        known = known_manifest(store, source_key(opened.model_id, opened.origin, opened.revision))
        if known is not None:
            return known
        check_architecture(load_json(opened.config, "config.json"))
        return _cut(opened, store, report)


def publish_from_hub(
    source: str,
    store: LayerStore,
    *,
    model_id: str | None = None,
    report: Report = silent,
    admit: Callable[[str], None] = lambda _: None,
) -> Manifest:
    """As `publish`, but whatever `source` says, no local path is meant."""
    from azu.models import hub  # huggingface_hub and its HTTP client: only where needed

    repo = hub.find_repo(source)
    admit(model_id or repo.repo_id)
    known = known_manifest(store, source_key(model_id or repo.repo_id, repo.repo_id, repo.commit))
    if known is not None:
        return known
    plan = hub.plan(repo)
    check_architecture(plan.config)
    check_space({plan.cache.folder: plan.missing_bytes, store.root: plan.weight_bytes if plan.missing_bytes else 0})
    with hub.open_plan(plan, report) as opened:
        return _cut(_named(opened, model_id), store, report)


def _named(source: ModelSource, model_id: str | None) -> ModelSource:
    return source if model_id is None else replace(source, model_id=model_id)


def means_path(source: str) -> bool:
    """Returns whether a source that does not exist was meant as a path, and not as a hub id."""
    path = Path(source)
    return path.is_absolute() or source.startswith((".", "~")) or path.suffix in {".gguf", *UNSAFE_SUFFIXES}


def open_path(path: Path, *, unhashed: bool = False) -> AbstractContextManager[ModelSource]:
    """Opens a .gguf file or a directory.

    Args:
        unhashed: for its shapes alone: leave the weights of a directory unread.

    Raises:
        InputError: code "bad_source", where it is neither. ModelError: as `open_directory` and `open_gguf`.
    """
    if path.suffix.lower() in UNSAFE_SUFFIXES:
        remedy = "Convert it to safetensors; azu never loads pickles."
        raise ModelError(f"{path.name} is a pickle", code="unsafe_weights", remedy=remedy)
    if path.is_dir():
        return open_directory(path, sources={} if unhashed else None)
    if not path.is_file():
        raise InputError(
            f"{path} does not exist",
            code="bad_source",
            remedy="Check the path, or name a hub id such as Qwen/Qwen3-0.6B.",
        )
    if path.suffix.lower() != ".gguf":
        raise InputError(
            f"{path.name} is neither a .gguf file nor a directory",
            code="bad_source",
            remedy="Name a .gguf file, the folder that holds config.json and *.safetensors, or a hub id.",
        )
    from azu.models.gguf_source import open_gguf  # numpy, gguf, tokenizers: only where needed

    return open_gguf(path)


def _cut(source: ModelSource, store: LayerStore, report: Report) -> Manifest:
    config = load_json(source.config, "config.json")
    drawn = outline(source.model_id, config, source.tensors)  # refuses what no manifest can say before it is cut
    found = take_inventory(config, source.tensors)
    files = {f"layer {index}": names for index, names in enumerate(found.layers)}
    blobs = _store_files(source, store, {**files, **{name: (name,) for name in found.shared}}, report)
    _confirm(source, store)
    manifest = replace(
        drawn,
        revision=source.revision,
        origin=source.origin,
        config=store.put_bytes(source.config),
        tokenizer={name: store.put_bytes(data) for name, data in source.files.items()},
        layers=tuple(blobs[label] for label in files),
        shared={name: blobs[name] for name in found.shared},
        sources=source.sources,
    )
    CutJournal(store, source).finish(manifest)
    return manifest


def _confirm(source: ModelSource, store: LayerStore) -> None:
    """Check that what was cut is what was hashed: else its revision would name other layers."""
    try:
        source.confirm()
    except InputError:
        CutJournal(store, source).forget()
        raise


def _store_files(
    source: ModelSource, store: LayerStore, files: Mapping[str, tuple[str, ...]], report: Report
) -> dict[str, Blob]:
    """Store tensors as files, by label; those that an earlier attempt stored are taken from its journal."""
    journal = CutJournal(store, source)
    blobs = {label: blob for label in files if (blob := journal.blob(label)) is not None}
    missing = [name for label, names in files.items() if label not in blobs for name in names]
    check_space({store.root: sum(source.tensors[name].nbytes for name in missing)})
    for done, (label, names) in enumerate(files.items()):
        report(Progress("cutting", label, done, len(files)))
        specs = [source.tensors[name] for name in names]
        if label not in blobs:
            blobs[label] = store.put_chunks(serialize(specs, source.read))
            journal.add(label, blobs[label])
        blobs[label] = replace(blobs[label], weights=weights_of(specs))
    report(Progress("cutting", "", len(files), len(files)))
    return blobs
