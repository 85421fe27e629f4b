"""Any mlx-lm model as a backbone (tokens to hidden states) and a head (hidden states to logits).

There is no code for single architectures. The model runs as it is while one submodule, the boundary, is replaced by a stub: for the
backbone the stub records the boundary's output, for the head it returns given hidden states. So soft caps, logit scales, tied,
quantized and adapted heads are the model's own. A split is used only if it reproduces the model's logits on a tiny input.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from attrs import frozen

from .closeness import close_logits


class _Stub:
    """In place of a module: a call returns `call(...)`; everything else is the module's."""

    def __init__(self, module: nn.Module, call: Callable[..., Any]) -> None:
        self.__dict__.update(_module=module, _call=call)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def __getitem__(self, key: Any) -> Any:
        return self._module[key]

    def __contains__(self, key: object) -> bool:
        return key in self._module


@frozen
class ModelSplit:
    """A model cut at the output of one submodule.

    Attributes:
        model: the whole model.
        path: dotted path of the boundary.
        by_owner: the head is the call of the boundary's owner, not of the whole model.
    """

    model: nn.Module
    path: str
    by_owner: bool = False

    def hidden(self, tokens: mx.array, **kwargs: Any) -> mx.array:
        """[R, T] to [R, T, D]; the logits of all positions stay lazy and are never computed."""
        seen: list[mx.array] = []

        def tap(*args: Any, **kw: Any) -> mx.array:
            seen.append(self._boundary()(*args, **kw))
            return seen[-1]

        with self._replaced(tap):
            self.model(tokens, **kwargs)
        if len(seen) != 1 or not isinstance(seen[0], mx.array):
            raise ValueError(f"{self.path} was called {len(seen)} times")
        return seen[0]

    def head(self, hidden: mx.array) -> mx.array:
        """[N, D] to [N, V]."""
        with self._replaced(lambda *_, **__: hidden[None]):
            whole = self._owner() if self.by_owner else self.model
            return whole(mx.zeros((1, hidden.shape[0]), mx.int32))[0]

    def _owner(self) -> nn.Module:
        module = self.model
        for name in self.path.split(".")[:-1]:
            module = dict.__getitem__(module, name)
        return module

    def _boundary(self) -> nn.Module:
        name = self.path.rsplit(".", 1)[-1]
        module = dict.__getitem__(self._owner(), name)
        return module._module if isinstance(module, _Stub) else module

    @contextmanager
    def _replaced(self, call: Callable[..., Any]) -> Iterator[None]:
        owner, name = self._owner(), self.path.rsplit(".", 1)[-1]
        module = dict.__getitem__(owner, name)
        dict.__setitem__(owner, name, _Stub(module, call))
        try:
            yield
        finally:
            dict.__setitem__(owner, name, module)


def find_split(model: nn.Module) -> ModelSplit | None:
    """The first cut, outermost submodules first, that reproduces the model's logits; None if there is none."""
    tokens = mx.array([[1, 2, 3, 4, 5]])
    logits = model(tokens)
    for path in _candidates(model):
        for by_owner in (True, False):
            split = ModelSplit(model, path, by_owner)
            try:
                if _exact(split, tokens, logits):
                    return split
            except Exception:  # the model's own code may raise anything at a wrong cut
                continue
    return None


def _candidates(model: nn.Module) -> list[str]:
    """Paths of the submodules outside of lists of layers, outermost first."""
    found: list[str] = []

    def walk(module: nn.Module, prefix: str) -> None:
        for name, child in dict.items(module):
            if isinstance(child, nn.Module):
                found.append(prefix + name)
                walk(child, f"{prefix}{name}.")

    walk(model, "")
    return sorted(found, key=lambda path: path.count("."))


def _exact(split: ModelSplit, tokens: mx.array, logits: mx.array) -> bool:
    hidden = split.hidden(tokens)
    if hidden.ndim != 3 or hidden.shape[:2] != tokens.shape:
        return False
    if hidden.shape == logits.shape and mx.array_equal(hidden, logits).item():
        return False  # the boundary makes the logits itself: nothing is left for a head
    some = mx.array([3, 1, 4])
    headed = split.head(hidden[0, some])
    if not close_logits(headed, logits[0, some], full=2e-4, half=6e-2):  # a matmul of 3 rows rounds unlike one of 5
        return False
    return not mx.array_equal(split.head(mx.zeros_like(hidden[0, some])), headed).item()
