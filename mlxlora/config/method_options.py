"""All options of a method as one object, which `mlxlora METHOD` and `ml.METHOD(...)` build."""

import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, dataclass_transform

import attrs

from ..errors import InputError
from .fields import only_python
from .given import storable

Part = TypeVar("Part")


@dataclass_transform(kw_only_default=True, frozen_default=True)
class MethodOptions:
    """The options of a method; a subclass inherits the groups that the method has, and this class first.

    Type checkers see one class with all options as keyword arguments.

    Args:
        groups: whole groups of options, such as `Training(iters=100)`.
        options: single options, which win over those of a group.

    Raises:
        InputError: an option that no group has, or a group that the method does not take.
    """

    def __init__(self, *groups: Any, **options: Any) -> None:
        parts = gather(self.kinds(), groups, options)
        values = {name: value for part in parts.values() for name, value in attrs.asdict(part, recurse=False).items()}
        self.__dict__.update(values, _parts=parts)

    @classmethod
    def kinds(cls) -> tuple[type, ...]:
        """The groups of the method, in the order of its help."""
        return tuple(kind for base in cls.__mro__ for kind in _groups_among(base))

    @classmethod
    def kind(cls, wanted: type[Part]) -> type[Part]:
        """The group of the method that is a `wanted`, such as `PairData` for `RowOptions`."""
        return next(kind for kind in cls.kinds() if issubclass(kind, wanted))

    @classmethod
    def signature(cls) -> inspect.Signature:
        """One keyword argument for each option, with its type and default."""
        fields = [field for kind in cls.kinds() for field in attrs.fields(kind)]
        keyword = inspect.Parameter.KEYWORD_ONLY
        return inspect.Signature([inspect.Parameter(f.name, keyword, default=f.default, annotation=f.type) for f in fields])

    def part(self, wanted: type[Part]) -> Part:
        """The group of these options that is a `wanted`."""
        return self.__dict__["_parts"][self.kind(wanted)]

    def parts(self) -> dict[type, Any]:
        """All groups by type."""
        return dict(self.__dict__["_parts"])


def _groups_among(base: type) -> Sequence[type]:
    """The groups that a class lists as its bases; the classes of the groups themselves list none."""
    if not issubclass(base, MethodOptions):
        return ()
    return [kind for kind in base.__bases__ if attrs.has(kind)]


def gather(kinds: Sequence[type], groups: Sequence[Any], options: Mapping[str, Any]) -> dict[type, Any]:
    """One group of every kind: the given ones, else new ones; single options are set in either.

    Raises:
        InputError: an option that no group has, or a group that the method does not take.
    """
    given = {type(group): group for group in groups}
    if unknown := [kind.__name__ for kind in given if kind not in kinds]:
        raise InputError(f"this method takes no {', '.join(unknown)}; it takes {', '.join(kind.__name__ for kind in kinds)}")
    fields = {field.name for kind in kinds for field in attrs.fields(kind)}
    for name in options:
        if name not in fields:
            close = difflib.get_close_matches(name, fields, n=1)
            raise InputError(f"unknown option {name}" + (f"; did you mean {close[0]}?" if close else ""))
    own = {kind: {f.name: options[f.name] for f in attrs.fields(kind) if f.name in options} for kind in kinds}
    return {kind: attrs.evolve(given[kind], **own[kind]) if kind in given else kind(**own[kind]) for kind in kinds}


def fields_of(*groups: type) -> dict[str, attrs.Attribute]:
    """The options of some groups by name, as flags and files have them; see `python_option`."""
    return {field.name: field for group in groups for field in attrs.fields(group) if not only_python(field)}


def build(group: type, values: Mapping[str, Any]) -> Any:
    """One group of options from those of `values` that it has."""
    return group(**{field.name: values[field.name] for field in attrs.fields(group) if field.name in values})


def dump(*groups: Any) -> dict[str, Any]:
    """The options of groups as one flat mapping that a configuration file can hold, see `storable`.

    >>> from mlxlora.config.options import SFTOptions
    >>> dump(SFTOptions(loss_type="dft"))
    {'loss_type': 'dft', 'neftune_noise_alpha': 0.0, 'objective': None}
    """
    flat = {
        name: value
        for group in groups
        for name, value in attrs.asdict(group, recurse=False, filter=lambda field, _: not only_python(field)).items()
    }
    return {name: storable(value) for name, value in flat.items()}


def options_for(function: Callable[..., Any], *groups: Any) -> dict[str, Any]:
    """The options that a function takes under the same names.

    >>> from mlxlora.config.options import DPOOptions
    >>> options_for(lambda beta, delta: None, DPOOptions(delta=2.0))
    {'beta': 0.1, 'delta': 2.0}
    """
    taken = inspect.signature(function).parameters
    return {name: value for group in groups for name, value in attrs.asdict(group, recurse=False).items() if name in taken}
