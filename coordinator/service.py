"""`azu-coordinator serve`: one coordinator process, from settings to a clean end."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial

import trio

from azu.accounts.presence import Presence
from azu.accounts.store import key_limits
from azu.config import CoordinatorSettings
from azu.datadir import open_data_dir
from azu.distribution import LayerServer, Library
from azu.economics import PRICES
from azu.errors import AzuError, InputError, NetworkError
from azu.identity import Identity
from azu.joining import overlay_config, stay_joined
from azu.ledger import Ledger
from azu.logs import log
from azu.models.manifest import Manifest
from azu.overlay import ANNOUNCE_SECONDS, Overlay, open_overlay
from azu.payments import PaymentProvider, open_provider
from azu.peerbook import PeerBook
from azu.planning import shape_of
from azu.records import (
    COORDINATORS_KEY,
    CoordinatorRecord,
    ModelOffer,
    WorkerRecord,
    coordinator_key,
    sign_coordinator_record,
)
from azu.tickets import JobTicket
from azu.wire.messages import ACCOUNT_PROTOCOL, LAYERS_PROTOCOL, PACK_PROTOCOL
from azu.wire.tensors import WEIGHT_FORMATS, WeightFormat
from coordinator.admin import admin_token
from coordinator.agreement import Handover
from coordinator.api import ApiSettings, AuthMode, Money, ShardRoutes, auth_mode, create_app, serve_http
from coordinator.catalogue import MAX_MODELS, Catalogue, Listed
from coordinator.generation import Generation, GenerationRequest, ModelHealth, ServedModel
from coordinator.jobs import JobRunner
from coordinator.ledger_settings import ledger_place
from coordinator.meter import Meter
from coordinator.old_meter import take_over_meter
from coordinator.owed import Owed
from coordinator.paying import keep_paying
from coordinator.placement import Placer, missing_layers
from coordinator.serving import Serving
from coordinator.shards import LoggedProgress, Sharder, ShardQueue, run_shard
from coordinator.swarm import SwarmView
from coordinator.unsettled import Unsettled

__all__ = ["Service", "serve"]

logger = logging.getLogger(__name__)

AGENT = "azu-coordinator/0.1.0"
_REFRESH_S = 20.0
_RECORD_LIFE_S = 90
_FREE_CURRENCY = "units"  # of a swarm without money


class Service:
    """What the HTTP side sees; implements `coordinator.generation.GenerationService`."""

    def __init__(self, serving: Serving, swarm: SwarmView, runner: JobRunner) -> None:
        self._serving = serving
        self._swarm = swarm
        self._runner = runner

    def models(self) -> Sequence[ServedModel]:
        """The published models."""
        return self._serving.models()

    def health(self) -> Sequence[ModelHealth]:
        """How well the swarm covers each model right now."""
        workers = self._swarm.workers()
        return [_health(model, missing_layers(model.manifest, workers), workers) for model in self.models()]

    def generate(self, request: GenerationRequest) -> AbstractAsyncContextManager[Generation]:
        """Start a job; see `GenerationService.generate`."""
        return self._runner.generate(request)

    def take_up(
        self, request: GenerationRequest, ticket: JobTicket, handovers: Sequence[Handover]
    ) -> AbstractAsyncContextManager[Generation]:
        """Go on with a job; see `GenerationService.take_up`."""
        return self._runner.take_up(request, ticket, handovers)


async def serve(settings: CoordinatorSettings) -> None:
    """Publish the models, plan for them and answer HTTP until cancelled.

    Raises:
        InputError: a setting that cannot work. ModelError: a model cannot be published.
    """
    if not settings.bootstrap:
        remedy = "See azu-coordinator serve --help"
        raise InputError("--bootstrap MULTIADDR is missing", code="missing_option", remedy=remedy)
    mode = auth_mode(settings.auth_mode, settings.payment_provider, settings.host, settings.public_url)
    async with open_provider(settings) as provider:
        with open_data_dir(settings.data_dir) as identity:
            await _publish_and_serve(settings, identity, provider, mode)


async def _publish_and_serve(
    settings: CoordinatorSettings, identity: Identity, provider: PaymentProvider, mode: AuthMode
) -> None:
    token = admin_token(settings)
    library, catalogue = Library(settings.data_dir), Catalogue(settings.data_dir)
    sharder = Sharder(identity, library, catalogue, settings.data_dir)
    serving = Serving(library, catalogue)
    for source in settings.models:
        serving.pin(await _publish(sharder, source))
    serving.refresh()
    stop = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_set_when_cancelled, stop)
        # From here on a cancel means: let the running answers end first.
        with trio.CancelScope(shield=True):
            async with _opened_ledger(settings, identity, provider) as meter:
                price = settings.price_per_token_layer or PRICES[settings.payment_provider]
                money = Money(meter.ledger, provider, mode, price, settings.public_url, meter.unsettled or ())
                await _serve(settings, identity, library, sharder, serving, meter, money, token, stop)
        nursery.cancel_scope.cancel()


async def _set_when_cancelled(stop: trio.Event) -> None:
    try:
        await trio.sleep_forever()
    finally:
        stop.set()


@asynccontextmanager
async def _opened_ledger(
    settings: CoordinatorSettings, identity: Identity, provider: PaymentProvider
) -> AsyncIterator[Meter]:
    """The ledger's meter, with nothing left in it of this coordinator's earlier life but what it goes on with."""
    currency = provider.coin.unit if provider.address else _FREE_CURRENCY
    place = ledger_place(settings)
    async with Ledger.open(place, currency=currency, owner=identity.peer_id, key_limits=key_limits) as ledger:
        await take_over_meter(settings.data_dir / "meter.sqlite", ledger)
        meter = Meter(ledger, is_free=not provider.address, unsettled=Unsettled(settings.data_dir))
        await meter.settle_kept()
        if released := await ledger.release_abandoned():
            log(logger, logging.WARNING, "reservations of jobs that never ended released", jobs=len(released))
        yield meter


async def _serve(
    settings: CoordinatorSettings,
    identity: Identity,
    library: Library,
    sharder: Sharder,
    serving: Serving,
    meter: Meter,
    money: Money,
    token: str,
    stop: trio.Event,
) -> None:
    """Everything that needs the network, until `stop` is set and the running answers have ended."""
    async with open_overlay(overlay_config(settings, identity, AGENT)) as overlay, trio.open_nursery() as nursery:
        log(logger, logging.INFO, "coordinator starting", peer=identity.peer_id, addrs=overlay.addrs)
        layers = LayerServer(library, slots=settings.uploads, rate=settings.upload_limit)
        overlay.handle(LAYERS_PROTOCOL, layers.handle)
        overlay.handle(ACCOUNT_PROTOCOL, Owed(identity, money.ledger).handle)
        swarm = SwarmView(overlay)
        presence = Presence(money.ledger)
        runner = JobRunner(identity, overlay, swarm, meter, price=money.price, successors=presence.others)
        models, kv_tokens = serving.manifests, settings.kv_tokens
        placer = Placer(identity, swarm, models, kv_tokens=kv_tokens, retired=serving.retired, cuts=runner.room.cuts)
        shards = ShardQueue(partial(sharder.shard, only_hub=True))
        nursery.start_soon(
            partial(stay_joined, overlay, settings.bootstrap, book=PeerBook(settings.data_dir / "peers.json"))
        )
        for task in (swarm.run, placer.run, serving.follow, shards.run, meter.run):
            nursery.start_soon(task)
        nursery.start_soon(keep_paying, settings, money.ledger, money.provider, swarm)
        nursery.start_soon(_advertise, identity, overlay, serving, settings.kv_tokens)
        service = Service(serving, swarm, runner)
        app = create_app(
            service,
            ApiSettings(default_max_tokens=settings.default_max_tokens),
            ShardRoutes(shards, serving.models, serving.is_listed, token),
            money,
            presence,
        )
        async with trio.open_nursery() as serving_http:
            url = await serving_http.start(partial(serve_http, app, settings.host, settings.port, stop=stop))
            names = [model.model_id for model in serving.models()]
            log(logger, logging.INFO, "answering OpenAI clients", url=f"{url}/v1", models=names,
                auth=money.mode, payments=money.provider.name)  # fmt: skip
            if not names:
                log(logger, logging.WARNING, "no model to serve", remedy="Run: azu-coordinator shard MODEL")
        nursery.cancel_scope.cancel()


async def _publish(sharder: Sharder, source: str) -> Manifest:
    """Cut a model into layer files, and sign its manifest."""
    log(logger, logging.INFO, "publishing model", source=source)
    started = time.monotonic()
    manifest = await run_shard(partial(sharder.cut, source), LoggedProgress(source))
    seconds = round(time.monotonic() - started, 1)
    log(logger, logging.INFO, "model published", model=manifest.model_id, manifest=manifest.digest,
        layers=manifest.n_layers, seconds=seconds)  # fmt: skip
    listed = {model.model_id for model in sharder.catalogue.models()}
    if manifest.model_id in listed:  # where both name a model the catalogue counts: it must not keep an older one
        sharder.catalogue.add(Listed(manifest.model_id, manifest.digest))
    return manifest


async def _advertise(identity: Identity, overlay: Overlay, serving: Serving, kv_tokens: int) -> None:
    """Keep this coordinator and its models findable in the DHT."""
    provided: dict[bytes, float] = {}
    sequence = 0
    while True:
        changed = serving.changed  # before the record is made: what changes while it travels is news again
        offers = [_offer(manifest, kv_tokens) for manifest in serving.manifests()]
        now = time.time()
        sequence = max(sequence + 1, int(now * 1000))  # grows also where the clock is set back
        record = CoordinatorRecord(
            peer_id=identity.peer_id,
            sequence=sequence,
            issued_at=int(now),
            expires_at=int(now) + _RECORD_LIFE_S,
            agent=AGENT,
            protocols=(LAYERS_PROTOCOL, ACCOUNT_PROTOCOL, PACK_PROTOCOL),
            addrs=overlay.addrs[:16],
            models=tuple(offers[:MAX_MODELS]),
        )
        keys = [COORDINATORS_KEY, *(bytes.fromhex(offer.manifest) for offer in record.models)]
        try:
            await overlay.put_record(coordinator_key(identity.peer_id), sign_coordinator_record(identity, record))
            for key in keys:
                if trio.current_time() >= provided.get(key, -ANNOUNCE_SECONDS) + ANNOUNCE_SECONDS:
                    await overlay.provide(key)
                    provided[key] = trio.current_time()
        except AzuError as error:
            level = logging.DEBUG if isinstance(error, NetworkError) else logging.WARNING
            log(logger, level, "record not published", reason=str(error))
            await trio.sleep(1)
            continue
        with trio.move_on_after(_REFRESH_S):
            await changed.wait()


def _offer(manifest: Manifest, kv_tokens: int) -> ModelOffer:
    def least(dtype: WeightFormat) -> int:
        shape = shape_of(manifest, dtype, kv_tokens)
        return min(shape.stage_bytes(layer, layer + 1) for layer in range(manifest.n_layers))

    return ModelOffer(
        model_id=manifest.model_id,
        manifest=manifest.digest,
        n_layers=manifest.n_layers,
        least_bytes={dtype: least(dtype) for dtype in WEIGHT_FORMATS},
    )


def _health(model: ServedModel, missing: tuple[tuple[int, int], ...], workers: Sequence[WorkerRecord]) -> ModelHealth:
    loaded = sum(worker.range_in("loaded", model.manifest.digest) is not None for worker in workers)
    return ModelHealth(model.model_id, not missing, missing, loaded)
