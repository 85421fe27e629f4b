"""Everything that mlxlora changes on a model object in place, and the way back.

mlx-lm's models have no hooks. So gradient checkpointing, NEFTune and `--fully-shard` give modules another class, attention
replaces a function in the Python module of the architecture, and some facts are kept on the model. All of it is recorded here,
and `restore` undoes it. (`distributed` patches models, too, and lies below `models`: hence this file is in `utils`.)
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from types import ModuleType
from typing import Any, Generic, TypeVar

from attrs import define, field, frozen

Value = TypeVar("Value")
_RECORD = "_mlxlora"  # the one attribute that a patched module has; no parameter: it is not in the module's dictionary


@define(eq=False)
class _Record:
    """What was changed on one module.

    Attributes:
        original: the class that it came with.
        values: what slots keep.
        undo: functions of the module, the latest last; a copy of the module has them, too.
        facts: names of the values that stay.
    """

    original: type
    values: dict[str, Any] = field(factory=dict)
    undo: list[Callable[[Any], None]] = field(factory=list)
    facts: set[str] = field(factory=set)


def _record(module: Any) -> _Record:
    return module.__dict__.setdefault(_RECORD, _Record(type(module)))


@frozen
class Slot(Generic[Value]):
    """A value that one part of mlxlora keeps on a module; it is neither a parameter nor in a file.

    Attributes:
        name: no other slot has it.
        default: what a module has that was given none.
        stays: `restore` keeps the value, because it is no patch but a fact about the model.
    """

    name: str
    default: Value
    stays: bool = False

    def get(self, module: Any) -> Value:
        """The module's value."""
        record: _Record | None = module.__dict__.get(_RECORD)
        return self.default if record is None else record.values.get(self.name, self.default)

    def put(self, module: Any, value: Value) -> None:
        """Gives the module a value."""
        record = _record(module)
        record.values[self.name] = value
        if self.stays:
            record.facts.add(self.name)

    @contextmanager
    def holding(self, module: Any, value: Value) -> Iterator[None]:
        """The module has this value while the context lasts."""
        before = self.get(module)
        self.put(module, value)
        try:
            yield
        finally:
            self.put(module, before)


def subclass(cls: type, methods: Mapping[str, Any]) -> type:
    """A class of the same name and module with other methods."""
    return type(cls.__name__, (cls,), {"__module__": cls.__module__, **methods})


def set_class(module: Any, cls: type, undo: Callable[[Any], None] | None = None) -> None:
    """Gives one instance another class, so paths of parameters and other models stay as they are.

    Args:
        module: the instance.
        cls: has the same layout, such as a subclass.
        undo: what `restore` calls with the module besides, before the module gets its own class back.
    """
    record = _record(module)
    if undo is not None:
        record.undo.append(undo)
    module.__class__ = cls


def converted(module: Any, cls: type[Any]) -> Any:
    """A new module of another class with the contents of `module`, and without its patches."""
    new: Any = dict.__new__(cls)  # not __init__, which would draw random weights
    dict.update(new, module)
    new.__dict__.update({name: copy(value) for name, value in module.__dict__.items() if name != _RECORD})
    return new


@contextmanager
def overridden(modules: Iterable[Any], methods: Callable[[type], Mapping[str, Any]]) -> Iterator[None]:
    """Instances have other methods while the context lasts; `methods` makes them from a module's class."""
    before = [(module, type(module)) for module in modules]
    for module, cls in before:
        module.__class__ = subclass(cls, methods(cls))
    try:
        yield
    finally:
        for module, cls in before:
            module.__class__ = cls


# --- functions of Python modules --------------------------------------------------------------------


@define(eq=False)
class _Replaced:
    """A function of a Python module that all models of an architecture share, and how many of them need the other one."""

    owner: ModuleType
    name: str
    original: Any
    users: int = 0


_replaced: dict[tuple[str, str], _Replaced] = {}
_FUNCTIONS: Slot[tuple[tuple[str, str], ...]] = Slot("functions", ())


def python_modules(model: Any) -> set[ModuleType]:
    """The Python modules that define the classes of a model's modules."""
    return {sys.modules[name] for module in model.modules() if (name := type(module).__module__) in sys.modules}


def replace_function(model: Any, owner: ModuleType, name: str, function: Callable[..., Any]) -> None:
    """Replaces a function of a Python module for the whole process, until each model that asked for it is restored."""
    key = (owner.__name__, name)
    if key in _FUNCTIONS.get(model):
        return
    _replaced.setdefault(key, _Replaced(owner, name, getattr(owner, name))).users += 1
    _FUNCTIONS.put(model, (*_FUNCTIONS.get(model), key))
    setattr(owner, name, function)


def _release(key: tuple[str, str]) -> None:
    entry = _replaced.get(key)
    if entry is None:
        return
    entry.users -= 1
    if entry.users <= 0:
        setattr(entry.owner, entry.name, entry.original)
        del _replaced[key]


# --- the way back -----------------------------------------------------------------------------------


def restore(model: Any) -> Any:
    """Undoes every patch on the modules of a model: classes, kept values, slices of parameters, replaced functions.

    Adapters are modules of their own and stay (`adapters` removes them). Where ranks hold slices of the parameters, all
    ranks have to call it, because it gathers them.

    Returns:
        The model, with the classes that it came with.
    """
    modules = {id(module): module for module in (model, *model.modules()) if _RECORD in module.__dict__}.values()
    for module in modules:
        for undo in reversed(_record(module).undo):
            undo(module)
    for module in modules:
        for key in _FUNCTIONS.get(module):
            _release(key)
        record: _Record = module.__dict__.pop(_RECORD)
        module.__class__ = record.original
        if record.facts:
            kept = {name: record.values[name] for name in record.facts}
            module.__dict__[_RECORD] = _Record(record.original, kept, facts=record.facts)
    return model
