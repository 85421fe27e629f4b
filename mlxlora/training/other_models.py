"""Models beside the policy: references, teachers and judges. They share the policy's tokenizer where tokens are compared."""

from collections.abc import Callable
from typing import Any

import mlx.nn as nn
from attrs import evolve

from ..adapters.prepare import load
from ..config.given import is_path, storable
from ..config.options import DistillOptions, DPOOptions, KTOOptions, ModelOptions
from ..errors import InputError
from ..models.loading import load_tokenizer
from ..models.logprobs import Scorer
from ..models.teacher import with_teacher
from ..objectives.divergences import DIVERGENCES
from ..reporting.card import portable
from ..utils.stages import staged
from .inputs import ReferenceOptions
from .reference import reference_cache_file

REFERENCE = "--reference-model-path"


def load_other(path: str, model: ModelOptions, flag: str, read: Callable[[ModelOptions], Any] | None = None) -> Any:
    """Loads another model as stored, whatever --quantize does to --model.

    Args:
        path: folder or hub name.
        model: options of the policy.
        flag: that names the other model; errors name it in place of --model.
        read: loads it; default: model and tokenizer.

    Raises:
        InputError: there is no such model, or it is damaged.
    """
    try:
        return (read or load)(evolve(model, model=path, quantize=None, tokenizer=None, chat_template=None, chat_template_args=None))
    except InputError as error:
        raise InputError(str(error).replace("--model", flag, 1)) from None


def loader(model: ModelOptions, path: str, flag: str = REFERENCE) -> Callable[[Any], nn.Module]:
    """tokenizer -> the other model, loaded when it is needed.

    The function raises InputError if the other model has another vocabulary.
    """

    def other(tokenizer: Any) -> nn.Module:
        with staged(f"loading {portable(path)}"):
            found, its_tokenizer = load_other(path, model, flag)
        if its_tokenizer.get_vocab() != tokenizer.get_vocab():
            raise InputError(f"{flag} {path}: its vocabulary is not that of --model {storable(model.model)}")
        return found

    return other


def cached_reference(model: ModelOptions, method: DPOOptions | KTOOptions) -> ReferenceOptions:
    """The reference of rows that are scored once, before training."""
    path = method.reference_model_path
    named = path or model.model
    cache = None
    if method.reference_cache and is_path(named):  # a model that Python passes may be any
        cache = reference_cache_file(str(named), "" if path else model.quantize or "")
    return ReferenceOptions(loader(model, path) if path else None, cache)


def live_reference(model: ModelOptions, path: str | None) -> ReferenceOptions:
    """The reference of completions that are sampled during the run, which is scored with each batch.

    Without a path it is the policy as training starts. Another model is loaded once the run has begun; its tokenizer is read at
    once, so that a wrong path fails early.

    Raises:
        InputError: there is no such model.
    """
    if path:
        load_other(path, model, REFERENCE, load_tokenizer)
    return ReferenceOptions(loader(model, path) if path else None)


def teacher(model: ModelOptions, method: DistillOptions) -> Callable[[Scorer, Any], Scorer]:
    """(scorer, tokenizer) -> a scorer that adds the divergence from the teacher to a batch."""
    load_teacher = loader(model, method.teacher_model or "", "--teacher-model")
    measure = DIVERGENCES[method.divergence](method.jsd_beta)
    return lambda score, tokenizer: with_teacher(score, load_teacher(tokenizer), measure)
