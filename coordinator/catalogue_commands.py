"""`azu-coordinator shard`, `models`, `remove` and `prune`: a data folder's models, whether a coordinator runs or not.

The running one takes up what these commands change within a second or two (`coordinator.serving`).
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from functools import partial
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from azu.config import CatalogueSettings, RemoveSettings, ShardSettings
from azu.datadir import open_data_dir, share_data_dir
from azu.distribution import Library
from azu.errors import CapacityError, InputError
from azu.models.manifest import Manifest
from azu.models.progress import Progress
from azu.models.published import is_whole
from azu.sizes import format_size
from coordinator.catalogue import Catalogue, Listed
from coordinator.shard_screen import ShardScreen
from coordinator.shards import Sharder, hold_lock, run_shard

__all__ = ["list_models", "prune", "remove", "shard"]


async def shard(settings: ShardSettings) -> None:
    """Cut a model and list it, with progress on stderr and the result on stdout."""
    identity = share_data_dir(settings.data_dir)
    library, catalogue = Library(settings.data_dir), Catalogue(settings.data_dir)
    before = catalogue.models()
    started = time.monotonic()
    with ShardScreen(Console(stderr=True, highlight=False)) as screen:
        is_known = True

        def report(progress: Progress) -> None:
            nonlocal is_known
            is_known = is_known and progress.stage == "waiting"
            screen.show(progress)

        work = Sharder(identity, library, catalogue, settings.data_dir).shard
        manifest = await run_shard(partial(work, settings.model), report)
    if any(model.model_id == manifest.model_id and model.manifest != manifest.digest for model in before):
        _free(settings, library, manifest.model_id)
    facts = {**_facts(manifest), "seconds": round(time.monotonic() - started, 1), "unchanged": is_known}
    if settings.as_json:
        click.echo(json.dumps(facts))
        return
    click.echo(manifest.model_id)
    size = f"{format_size(facts['bytes'])} ({facts['bytes']:,} bytes)"
    shown = {**{name: facts[name] for name in ("revision", "manifest", "layers")}, "size": size}
    for name, value in {**shown, "seconds": facts["seconds"]}.items():
        click.echo(f"  {name:<10}{value}")
    if is_known:
        click.echo("  unchanged: this revision was cut before")


def list_models(settings: CatalogueSettings) -> None:
    """Print what is listed."""
    listed = Catalogue(settings.data_dir).models()
    facts = _listed_facts(Library(settings.data_dir), listed) if listed else []
    if settings.as_json:
        click.echo(json.dumps({"models": facts}, indent=2))
        return
    if not facts:
        click.echo("no models; add one with: azu-coordinator shard MODEL")
        return
    table = Table("MODEL", "REVISION", "MANIFEST", box=None, pad_edge=False)
    table.add_column("LAYERS", justify="right")
    table.add_column("SIZE", justify="right")
    for model in facts:
        size = format_size(model["bytes"]) if model["complete"] else "incomplete"
        table.add_row(model["model_id"], model["revision"][:12], model["manifest"][:12], str(model["layers"]), size)
    Console(highlight=False, soft_wrap=True).print(table)
    if not all(model["complete"] for model in facts):
        click.echo("files of what is incomplete are missing or damaged: shard it again")


def remove(settings: RemoveSettings) -> None:
    """Unlist a model, and delete its files unless a running coordinator will."""
    model = Catalogue(settings.data_dir).remove(settings.model_id)
    freed = _free(settings, Library(settings.data_dir), model.model_id)
    if settings.as_json:
        click.echo(json.dumps({"model_id": model.model_id, "manifest": model.manifest, "freed_bytes": freed}))
    elif freed is None:
        click.echo(f"removed {model.model_id}; the running coordinator stops serving it and deletes its files")
    else:
        click.echo(f"removed {model.model_id}, {format_size(freed)} freed")


def prune(settings: CatalogueSettings) -> None:
    """Delete what interrupted cuts left.

    Raises:
        CapacityError: code "cut_at_work", while a model is being cut.
    """
    library = Library(settings.data_dir)
    with hold_lock(settings.data_dir / "shard.lock", _refuse_to_wait):
        freed = Catalogue(settings.data_dir).prune(library)
    click.echo(json.dumps({"freed_bytes": freed}) if settings.as_json else f"{format_size(freed)} freed")


def _refuse_to_wait(_: Progress) -> None:
    remedy = "Run it again when that has ended."
    raise CapacityError("a model is being cut into this data folder", code="cut_at_work", remedy=remedy)


def _free(settings: CatalogueSettings, library: Library, model_id: str) -> int | None:
    """Delete the files of a model's revisions that are not listed; None where that is a running coordinator's business.

    All of them, since a program that was killed may have left older ones.
    """
    catalogue = Catalogue(settings.data_dir)
    try:
        with open_data_dir(settings.data_dir):
            known = [manifest for _, manifest in library.manifests()]
            return sum(catalogue.free(library, manifest) for manifest in known if manifest.model_id == model_id)
    except InputError as error:
        if error.code != "data_dir_in_use":
            raise
        return None


def _listed_facts(library: Library, listed: Iterable[Listed]) -> list[dict[str, Any]]:
    known = dict(library.manifests())
    lost = {"revision": "", "layers": 0, "bytes": 0, "complete": False}
    return [
        {**_facts(known[model.manifest]), "complete": is_whole(library.store, known[model.manifest])}
        if model.manifest in known
        else {"model_id": model.model_id, "manifest": model.manifest, **lost}
        for model in listed
    ]


def _facts(manifest: Manifest) -> dict[str, Any]:
    return {
        "model_id": manifest.model_id,
        "revision": manifest.revision,
        "manifest": manifest.digest,
        "layers": manifest.n_layers,
        "bytes": sum(blob.size for blob in manifest.blobs()),
    }
