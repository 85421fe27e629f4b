"""The reference policy as a column of the batch: objectives and steps never see a second model.

The reference's log-probabilities are computed once, for the rows that a run uses, and cached on disk. If the policy samples
the rows itself, they are computed with each batch.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from attrs import evolve
from mlx.utils import tree_flatten, tree_unflatten

from ..adapters.files import sound_arrays
from ..adapters.prepare import disabled
from ..config.options import AdapterOptions
from ..data.batching import Make, MicroBatch, collate
from ..data.shape_buckets import Signatures
from ..data.tokenize import Example
from ..distributed.ranks import ALONE, Ranks
from ..models.logprobs import Scorer, scorer
from ..models.modes import evaluating, exact
from ..utils.files import cache_folder
from ..utils.integers import ceil_div
from ..utils.patches import Slot
from ..utils.safetensors import read_checked, write_arrays
from ..utils.ticks import ticking

_Item = TypeVar("_Item")
Logps = np.ndarray
Note = Callable[[str], None]


def with_reference(
    examples: Sequence[Example],
    score: Scorer,
    *,
    batch_size: int,
    together: int = 1,
    cache: Path | None = None,
    note: Note = lambda _: None,
    ranks: Ranks = ALONE,
) -> list[Example]:
    """The examples with `ref_logps`, from the cache if it has them.

    Args:
        examples: token sequences; equal ones are scored once.
        score: scores batches with the reference model.
        batch_size: sequences in a batch.
        together: this many consecutive examples share a prompt, which is computed once; 1 = every row is computed whole.
        cache: file of log-probabilities of this model; a damaged or stale one is rebuilt.
        note: gets messages.
        ranks: processes with the same examples that score them together; rank 0 has the cache.
    """
    digests = [_digest(e) for e in examples]
    wanted = dict(zip(digests, examples, strict=True))
    known = _trusted(cache, wanted, score, note) if cache and ranks.leads else {}
    absent = set(ranks.of_rank0([i for i, digest in enumerate(wanted) if digest not in known]))
    missing = {digest: e for i, (digest, e) in enumerate(wanted.items()) if i in absent}
    known |= _heard(known, {digest: e for digest, e in wanted.items() if digest not in missing}, ranks)
    if missing:
        note(f"reference: scoring {len(missing)} sequences")
        whole = _whole_groups(digests, missing, together)
        alone = [digest for digest in missing if digest not in set(whole)]
        for some, size in filter(all, ((whole, together), (alone, 1))):
            known |= dict(zip(some, _together([missing[d] for d in some], score, batch_size, size, ranks), strict=True))
        if cache and ranks.leads:
            _keep(cache, known, note)
    return [evolve(e, ref_logps=known[digest]) for e, digest in zip(examples, digests, strict=True)]


def _heard(known: Mapping[bytes, Logps], wanted: Mapping[bytes, Example], ranks: Ranks) -> dict[bytes, Logps]:
    """The log-probabilities of the wanted sequences that rank 0 knows."""
    if ranks.size == 1 or not wanted:
        return {}
    ends = np.cumsum([int(e.loss_mask.sum()) for e in wanted.values()])
    own = np.concatenate([known[d] for d in wanted]) if ranks.leads else np.zeros(ends[-1], np.float32)
    return dict(zip(wanted, np.split(np.array(ranks.from_first(mx.array(own))), ends[:-1]), strict=True))


def _together(examples: Sequence[Example], score: Scorer, batch_size: int, size: int, ranks: Ranks) -> list[Logps]:
    """`log_probabilities`; each rank computes its share."""
    groups = batched(range(len(examples)), size)
    share = list(ranks.share(groups))
    idle = (
        groups[:1] * (ceil_div(len(groups), ranks.size) - len(share)) if ranks.sharded else []
    )  # all ranks pass through the model equally often
    with ranks.computing():
        found_here = log_probabilities([examples[i] for group in share + idle for i in group], score, batch_size, size)
    own = found_here[: sum(map(len, share))]
    if ranks.size == 1:
        return own
    numbers = [i for rank in range(ranks.size) for group in groups[rank :: ranks.size] for i in group]
    flat = np.concatenate(ranks.gathered(np.concatenate([np.zeros(0, np.float32), *own])))
    ends = np.cumsum([int(examples[i].loss_mask.sum()) for i in numbers])
    found = dict(zip(numbers, np.split(flat, ends[:-1]), strict=True))
    return [found[i] for i in range(len(examples))]


CONTINUED: Slot[bool] = Slot("continued", False)
"""Whether the adapters of a model, or the weights that are trained, started from those of an earlier run."""

START = "start.safetensors"
"""The file of a run's folder with the policy as training started, if that is neither the base nor another model."""

Policy = Callable[[], AbstractContextManager[nn.Module]]
"""A context in which a model computes what a policy does; it ends with the model as it was."""


def policy_at_start(model: nn.Module, options: AdapterOptions) -> Policy:
    """The policy as training starts, the reference of a run that names no other model.

    New adapters change nothing yet, so without them the model is the reference. Adapters that an earlier run trained
    (--resume-adapter-file, or the same model object), and weights in full training, are kept as a second, frozen set of the
    trainable parameters; their arrays are those of the model until its first step, so no second model is loaded.

    Args:
        model: ready for its first step.
        options: what is trained.
    """
    if starts_trained(model, options) or options.train_type == "full":
        return partial(_with_parameters, model, model.trainable_parameters())
    return partial(disabled, model)


def starts_trained(model: nn.Module, options: AdapterOptions) -> bool:
    """Whether training starts from what an earlier run trained, so that the model's files alone do not give the reference."""
    return bool(options.resume_adapter_file) or CONTINUED.get(model)


def stored_start(model: nn.Module, path: Path) -> Policy:
    """The policy as training started, of a trained model, from the file of its run.

    Raises:
        InputError: the file is missing or damaged.
    """
    trained = dict(tree_flatten(model.trainable_parameters()))
    found = [(name, array) for name, array in sound_arrays(path).items() if name in trained]  # without the beginnings of PiSSA
    return partial(_with_parameters, model, tree_unflatten(found))


@contextmanager
def _with_parameters(model: nn.Module, parameters: Any) -> Iterator[nn.Module]:
    """The model with other trainable parameters, of which nothing is rounded (enter `evaluating` within)."""
    before = model.trainable_parameters()
    model.update(parameters)
    try:
        with exact(model):
            yield model
    finally:
        model.update(before)


def referenced(make: Make, policy: Policy, temperature: float) -> Make:
    """Micro-batches with `ref_logps` of a policy, computed as they are made.

    The parameters of the policy are constants of a compiled function, so they must not change.
    """
    with policy() as model, evaluating(model):
        score = scorer(model, temperature=temperature)
    run = mx.compile(partial(score, gradient=False))

    def with_column(items: Sequence[Any], index: int) -> MicroBatch:
        micro = make(items, index)
        with policy() as model, evaluating(model):
            ref_logps = run(micro.batch)[0]
            mx.eval(ref_logps)
        return micro._replace(batch=micro.batch._replace(ref_logps=ref_logps))

    return with_column


def log_probabilities(examples: Sequence[Example], score: Scorer, batch_size: int, together: int = 1) -> list[Logps]:
    """[trained tokens] float32 of each example, without a gradient; examples of similar length share a batch.

    Each `together` consecutive examples share a prompt.
    """
    run, shapes = mx.compile(partial(score, gradient=False)), Signatures()
    groups = sorted(batched(range(len(examples)), together), key=lambda group: max(len(examples[i].tokens) for i in group))
    found: dict[int, Logps] = {}
    for batch in ticking(batched(groups, max(batch_size // together, 1)), size=lambda batch: sum(map(len, batch))):
        some = [i for group in batch for i in group]
        groups = list(batched(range(len(some)), together)) if together > 1 else ()
        logps = np.array(run(shapes.fit(collate([examples[i] for i in some], groups=groups)))[0])
        ends = np.cumsum([int(examples[i].loss_mask.sum()) for i in some])
        found |= dict(zip(some, np.split(logps[: ends[-1]], ends[:-1]), strict=True))
    return [found[i] for i in range(len(examples))]


def reference_cache_file(model: str, dtype: str) -> Path:
    """The file that caches the log-probabilities of `model`, in $MLXLORA_CACHE or ~/.cache/mlxlora, by its name and content.

    Of a model of the hub, the name of the snapshot counts, which is its revision.
    """
    folder = Path(model) if Path(model).is_dir() else snapshot_of(model)
    files = sorted(folder.glob("*.safetensors")) + sorted(folder.glob("*.json")) if folder else []
    stats = [(f.name, f.stat().st_size, f.stat().st_mtime_ns, sampled_digest(f)) for f in files]
    key = hashlib.sha256(repr((str(folder.resolve()) if folder and files else model, dtype, stats)).encode()).hexdigest()
    return cache_folder("reference") / f"{key[:24]}.safetensors"


def snapshot_of(model: str) -> Path | None:
    """The folder of a hub model in the hub's cache, as mlx-lm has just loaded it; None if there is none."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(model, "config.json")
    except (HFValidationError, OSError):
        return None
    return Path(found).parent if isinstance(found, str) else None


def sampled_digest(file: Path) -> str:
    """A digest of a file's beginning, end and blocks between: weights that were exchanged differ there, whatever their date."""
    size, digest = file.stat().st_size, hashlib.sha256()
    with file.open("rb") as opened:
        for start in sorted({0, max(size - _BLOCK, 0), *(size * part // _BLOCKS for part in range(_BLOCKS))}):
            opened.seek(start)
            digest.update(opened.read(_BLOCK))
    return digest.hexdigest()


_BLOCK, _BLOCKS = 1 << 14, 64


def cache_of_start(cache: Path, model: nn.Module, options: AdapterOptions) -> Path:
    """The cache of the policy as training starts: that of the model, unless --resume-adapter-file changes what it computes."""
    if not starts_trained(model, options):
        return cache
    digest = hashlib.sha256(repr(evolve(options, resume_adapter_file=None)).encode())
    flat: list[tuple[str, mx.array]] = tree_flatten(model.trainable_parameters())  # type: ignore[assignment]
    for name, array in sorted(flat, key=lambda entry: entry[0]):
        digest.update(name.encode() + np.array(array.reshape(-1).view(mx.uint8)).tobytes())
    return cache.with_name(f"{cache.stem}-{digest.hexdigest()[:16]}{cache.suffix}")


# --- the cache: {digests [n, 32], ends [n], logps [Σ]}, with a digest of all of it -----------------


def batched(items: Sequence[_Item], size: int) -> list[tuple[_Item, ...]]:
    """`itertools.batched` of Python 3.12.

    >>> batched("abcde", 2)
    [('a', 'b'), ('c', 'd'), ('e',)]
    """
    return [tuple(items[start : start + size]) for start in range(0, len(items), size)]


def _whole_groups(digests: Sequence[bytes], missing: Mapping[bytes, Example], size: int) -> list[bytes]:
    """The groups of `size` whose members are all missing and in no earlier group."""
    taken: dict[bytes, None] = {}
    for group in batched(digests, size) if size > 1 else ():
        if len({d for d in group if d in missing and d not in taken}) == size:
            taken |= dict.fromkeys(group)
    return list(taken)


def _digest(example: Example) -> bytes:
    return hashlib.sha256(example.tokens.tobytes() + b"|" + np.packbits(example.loss_mask).tobytes()).digest()


def _trusted(cache: Path, wanted: dict[bytes, Example], score: Scorer, note: Note) -> dict[bytes, Logps]:
    """The content of the cache; nothing if it is damaged or the model does not agree with it on one of the wanted sequences."""
    if not cache.exists():
        return {}
    try:
        known = _read(cache)
    except (ValueError, KeyError, OSError) as error:
        note(f"reference: the cache {cache} is damaged ({error}); it is rebuilt")
        return {}
    probe = next((digest for digest in wanted if digest in known), None)
    if probe is None:
        return known
    (now,) = log_probabilities([wanted[probe]], score, 1)
    if now.shape != known[probe].shape or not np.allclose(now, known[probe], rtol=1e-2, atol=1e-2):
        note(f"reference: the cache {cache} is stale: the model's log-probabilities differ from it; it is rebuilt")
        return {}
    return known


def _read(path: Path) -> dict[bytes, Logps]:
    arrays = read_checked(path)
    return dict(zip(map(bytes, arrays["digests"]), np.split(arrays["logps"], arrays["ends"][:-1]), strict=True))


def _keep(cache: Path, known: dict[bytes, Logps], note: Note) -> None:
    """Writes the cache; a failure is only noted, because a run does not depend on it."""
    try:
        _write(cache, known)
    except OSError as error:
        note(f"reference: the cache {cache} cannot be written ({error.strerror})")


def _write(path: Path, known: dict[bytes, Logps]) -> None:
    digests = np.frombuffer(b"".join(known), np.uint8).reshape(-1, 32)
    ends = np.cumsum([len(v) for v in known.values()]).astype(np.int64)
    write_arrays(path, {"digests": digests, "ends": ends, "logps": np.concatenate(list(known.values())).astype(np.float32)})
