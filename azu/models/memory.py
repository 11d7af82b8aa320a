"""How much memory a stage takes, from the manifest alone. Pure arithmetic, for planners and for the worker itself.

What counts is what a stage adds to a process that runs torch already: on a CPU the growth of its resident memory, on
CUDA what torch's allocator reserves. On top of it come Python, torch and libp2p (about 400 MiB of main memory), and
CUDA's own context (300 to 600 MiB of the card).

    weights      each tensor at its dtype in memory; integer formats take the matrices of the layers only
    kv           keys and values of all positions that jobs may reserve, and the states of linear attention
    activations  the peak of one layer, or of sampling: a pass takes a chunk of a prompt and a token of every other job
    kernels      that oneDNN compiles on a CPU for each shape of a product, as they are needed
    loading      experts are put together out of single tensors, oneDNN prepacks the head, and layers of one input are
                 joined; over before the first job
    overhead     free pieces that the allocator keeps, modules

**Several jobs.** A worker runs at most MAX_JOBS at once, and they reserve `tokens` positions together. A layer that
keeps all tokens holds `tokens` then; one with a window holds no more than that, and no more than MAX_JOBS windows; each
job has a state of its own. Where a family's jobs cannot share a pass, activations are those of one.

**Kernels** are the one part that depends on the machine: in 16-bit formats a CPU without AVX-512 has none, and a GPU
none at all. What is counted is the most that it can be.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from azu.errors import ModelError
from azu.models.layout import is_first_stage_tensor
from azu.models.manifest import Blob, Manifest
from azu.models.safetensors_file import ITEM_BYTES
from azu.models.weight_formats import INT4_GROUP
from azu.wire.tensors import ACTIVATIONS, ITEMSIZE, WEIGHT_FORMATS, WeightFormat

__all__ = [
    "KEPT_KERNELS",
    "MAX_CHUNK_ROWS",
    "MAX_JOBS",
    "StageMemory",
    "chunk_rows",
    "first_positions",
    "kv_bytes",
    "kv_room",
    "layer_bytes",
    "max_layers",
    "stage_memory",
    "takes_turns",
    "weights_bytes",
]

MAX_JOBS = 32  # that a worker runs at once
# A chunk of a prompt: large enough that the device is busy, small enough that stages overlap and buffers stay small.
MAX_CHUNK_ROWS = 256
_MAX_CHUNK_BYTES = 4_194_304

_OVERHEAD_BYTES = 12 << 20
# A kernel of oneDNN is for one number of rows. In 16-bit formats each linear layer has its own, so that in time as many
# are held as may be; in float32 the prepacked head alone has some: one for each number of jobs that share a pass.
KEPT_KERNELS = 64
_KERNEL_BYTES, _EXPERTS_KERNEL_BYTES = 800 << 10, 1200 << 10  # with AVX-512; a third less without
_OVERHEAD_SHARE = 100  # one part of so many of the weights
_STREAM_COPIES = 4  # of a chunk's hidden states: as they came, the residual, normalised, the output
# For each job and entry of the vocabulary: logits, scores and weights in float32, their sums in float64, what penalties
# count.
_SAMPLER_BYTES = 24
_FUSED_SHARE = (1, 2)  # of the largest layer: gate and up projections of all experts, once in parts and once as one
# Whose jobs never share a pass (`azu.models.packing`).
_TURNS = frozenset(
    f"{name}ForCausalLM"
    for name in ("Bamba", "Bloom", "Falcon", "FalconH1", "GPTJ", "GPTNeo", "GraniteMoeHybrid", "Lfm2", "Llama4", "Mpt")
) | {"Qwen3NextForCausalLM", "Qwen3_5ForCausalLM", "StableLmForCausalLM"}
_INTEGERS = frozenset({"BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64"})


@dataclass(frozen=True, slots=True)
class StageMemory:
    """A stage's memory in bytes; `kv_per_token` is what each position costs in layers that keep all of them."""

    weights: int
    kv: int
    kv_per_token: int
    activations: int
    kernels: int
    loading: int
    overhead: int

    @property
    def total(self) -> int:
        """The most that is ever held at once."""
        return self.weights + self.overhead + max(self.loading, self.kv + self.activations + self.kernels)


def stage_memory(
    manifest: Manifest,
    start: int,
    end: int,
    dtype: WeightFormat,
    tokens: int,
    jobs: int = MAX_JOBS,
    *,
    packed: bool = False,
) -> StageMemory:
    """The memory of layers start..end (end exclusive) with `tokens` positions of KV cache for at most `jobs` jobs.

    Args:
        packed: whether oneDNN prepacks layers in float32 too, which takes kernels.

    Raises:
        ModelError: code "bad_layer_range" or "unsupported_dtype".
    """
    weights = weights_bytes(manifest, start, end, dtype)
    largest = max(_held(blob, dtype) for blob in manifest.layers[start:end])
    fusing = largest * _FUSED_SHARE[0] // _FUSED_SHARE[1] if manifest.workspace.fused else 0
    # Two of three matrices of a feed-forward layer are held twice for a moment, and one of them three times.
    joining = largest if packed or dtype == "bfloat16" else 0
    head = _head(manifest, start, end, dtype)
    together = 1 if takes_turns(manifest.architecture) else min(jobs, MAX_JOBS)
    return StageMemory(
        weights=weights,
        kv=kv_bytes(manifest, start, end, tokens, dtype, jobs),
        kv_per_token=sum(cache.per_token for cache in manifest.caches[start:end]) * _item(dtype),
        activations=_activations(manifest, start, end, dtype, tokens, together),
        kernels=_kernels(manifest, dtype, together if head else 0, packed=packed),
        loading=max(fusing, joining, 2 * head - weights),  # the head is read before there are layers
        overhead=_OVERHEAD_BYTES + weights // _OVERHEAD_SHARE,
    )


def takes_turns(architecture: str) -> bool:
    """Whether jobs of that class of transformers are known never to share a pass."""
    return architecture in _TURNS


def kv_room(
    manifest: Manifest,
    start: int,
    end: int,
    dtype: WeightFormat,
    memory: int,
    wanted: int = 0,
    *,
    packed: bool = False,
) -> int:
    """Returns how many positions of KV cache fit beside layers start..end in `memory` bytes; -1 if not even the layers.

    No more are counted than MAX_JOBS jobs of the model's whole context can use, or than are `wanted`.

    Raises:
        ModelError: as `stage_memory`.
    """
    low, high = -1, max(MAX_JOBS * manifest.context_length, wanted)
    while low < high:
        middle = (low + high + 1) // 2
        if stage_memory(manifest, start, end, dtype, middle, packed=packed).total <= memory:
            low = middle
        else:
            high = middle - 1
    return low


def max_layers(
    manifest: Manifest, start: int, memory: int, tokens: int, dtype: WeightFormat, limit: int | None = None
) -> int:
    """Returns how many layers from `start` fit into `memory` bytes with `tokens` positions of KV cache; 0 if none.

    Args:
        limit: the layer to stop at; the model's end where omitted, which brings the head with it.
    """
    low, high = start, max(start, manifest.n_layers if limit is None else limit)
    while low < high:
        middle = (low + high + 1) // 2
        if stage_memory(manifest, start, middle, dtype, tokens).total <= memory:
            low = middle
        else:
            high = middle - 1
    return low - start


def weights_bytes(manifest: Manifest, start: int, end: int, dtype: WeightFormat) -> int:
    """Returns the weights of layers start..end (end exclusive) in bytes at `dtype`, with what such a stage shares.

    The first stage holds the embeddings, the last the final norm and the head; where the head is tied, both hold the
    embedding, and a stage that is both holds it once.

    Raises:
        ModelError: code "bad_layer_range" or "unsupported_dtype".
    """
    if not 0 <= start < end <= manifest.n_layers:
        raise ModelError(f"layers {start}..{end} do not lie in a model of {manifest.n_layers}", code="bad_layer_range")
    layers = sum(layer_bytes(manifest, index, dtype) for index in range(start, end))
    shared = _shared(manifest, first=start == 0, last=end == manifest.n_layers)
    return layers + sum(_held(blob, dtype) for blob in shared)


def layer_bytes(manifest: Manifest, index: int, dtype: WeightFormat) -> int:
    """Returns the weights of one layer alone, and the tables that it computes from them, in bytes."""
    return _held(manifest.layers[index], dtype, manifest.hidden_size) + manifest.workspace.tables


def kv_bytes(manifest: Manifest, start: int, end: int, tokens: int, dtype: WeightFormat, jobs: int = MAX_JOBS) -> int:
    """Returns the caches of `jobs` jobs with `tokens` positions together in layers start..end, in bytes."""
    jobs = min(jobs, tokens)
    rows = chunk_rows(manifest.hidden_size, dtype)
    total = 0
    for cache in manifest.caches[start:end]:
        # Until its next step a window holds what the last one was computed from: up to a chunk more.
        held = min(tokens, jobs * (cache.window + rows)) if cache.window else tokens
        total += cache.per_token * held * _item(dtype) + cache.state_bytes * jobs
    return total


def first_positions(prompt_tokens: int) -> int:
    """Positions of KV cache that a job begins with: its prompt's and the first token's."""
    return prompt_tokens + 1


def chunk_rows(hidden_size: int, dtype: WeightFormat) -> int:
    """The most positions that travel in one chunk; a function of the model alone, so that both ends agree."""
    return max(1, min(MAX_CHUNK_ROWS, _MAX_CHUNK_BYTES // (hidden_size * _item(dtype))))


def _activations(manifest: Manifest, start: int, end: int, dtype: WeightFormat, tokens: int, together: int) -> int:
    """The peak of a pass in which `together` jobs share: chunks, and a token of each job that has none."""
    work, item = manifest.workspace, _item(dtype)
    chunk = chunk_rows(manifest.hidden_size, dtype)
    rows = min(MAX_CHUNK_ROWS, together * chunk) + together - 1
    longest = min(tokens, manifest.context_length)  # of one job
    windows = [cache.window for cache in manifest.caches[start:end]]
    reach = max(min(longest, window + chunk) if window else longest for window in windows)
    # Attention itself is computed for one job after the other.
    attention = rows * work.attention * item + reach * work.token * item + chunk * reach * work.pair
    layer = rows * _STREAM_COPIES * manifest.hidden_size * item + max(rows * work.mlp * item, attention)
    sampler = together * manifest.vocab_size * _SAMPLER_BYTES if end == manifest.n_layers else 0
    return max(layer, sampler)


def _kernels(manifest: Manifest, dtype: WeightFormat, heads_rows: int, *, packed: bool) -> int:
    """What oneDNN compiles; `heads_rows` are the numbers of rows that a prepacked head may be computed for."""
    if packed or _item(dtype) == 2:
        return KEPT_KERNELS * (_EXPERTS_KERNEL_BYTES if manifest.workspace.fused else _KERNEL_BYTES)
    return min(KEPT_KERNELS, heads_rows) * _KERNEL_BYTES


def _shared(manifest: Manifest, *, first: bool, last: bool) -> Iterable[Blob]:
    sizes = {name: blob.size for name, blob in manifest.shared.items()}
    before = {name for name in sizes if is_first_stage_tensor(name)}
    needed = {name for name in sizes if (first if name in before else last)}
    if last and manifest.tied and before:
        needed.add(max(before, key=sizes.__getitem__))  # the token embedding is the largest of them
    return [manifest.shared[name] for name in sorted(needed)]


def _head(manifest: Manifest, start: int, end: int, dtype: WeightFormat) -> int:
    """Bytes of a head that is no embedding of the same stage, which oneDNN prepacks on a CPU; 0 where there is none."""
    if end < manifest.n_layers or (manifest.tied and start == 0):
        return 0
    return max((_held(blob, dtype) for blob in _shared(manifest, first=False, last=True)), default=0)


def _held(blob: Blob, dtype: WeightFormat, hidden_size: int = 0) -> int:
    """A file's tensors in memory, in bytes, rounded up; only with a `hidden_size` are matrices held as integers."""
    item = _item(dtype)
    total = 0
    for part in blob.weights:
        if part.dtype in _INTEGERS:
            total += part.nbytes
            continue
        values, matrix = part.nbytes // ITEM_BYTES[part.dtype], part.matrix_nbytes // ITEM_BYTES[part.dtype]
        if hidden_size and dtype in ("int8", "int4"):
            total += (values - matrix) * item + _integers(matrix, dtype, hidden_size)
        else:
            total += values * item
    return total


def _integers(values: int, dtype: WeightFormat, columns: int) -> int:
    """A linear layer's weight as integers with their scales; as `weight_formats.integer_bytes`, rows not known."""
    return values + 3 * -(-values // columns) if dtype == "int8" else values // 2 + -(-values // INT4_GROUP) * 4


def _item(dtype: WeightFormat) -> int:
    """Bytes of a number that a stage in this format computes with."""
    if dtype not in WEIGHT_FORMATS:
        raise ModelError(f"dtype {dtype!r} is not one of {', '.join(WEIGHT_FORMATS)}", code="unsupported_dtype")
    return ITEMSIZE[ACTIVATIONS[dtype]]
