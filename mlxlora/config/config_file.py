"""Settings in layers: flags over a YAML file over the starter's defaults over the built-in ones.

Every option is a YAML key of the same name, with dashes or underscores. This module reads such a file, checks every value
against the type and the validator of its option, and writes a resolved configuration that is itself a valid file.
"""

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import attrs
import yaml
from attrs import frozen

from ..errors import InputError, listed, plain, quoted
from ..utils import trust
from . import mlx_lm_compat as peers
from .fields import dashed, names_in, plain_type

ALIASES = {
    "num_epochs": "epochs",
    "temp": "temperature",
    "dpo_loss_type": "loss_type",
    "lora_parameters.rank": "rank",
    "lora_parameters.scale": "scale",
    "lora_parameters.dropout": "dropout",
    "lora_parameters.keys": "lora_keys",
}
"""Other names of an option, beside those in `peers`; a dot separates the keys of a nested mapping."""

TRAIN = "train"
"""mlx-lm's switch between training and testing: accepted, because the subcommand already says it."""

METHOD = "method"
"""What a run's own file says that the run is: checked where something is trained, an option of `preview`."""

Fields = Mapping[str, attrs.Attribute]
Tell = Callable[[str], Any]


def fields_of(*groups: type) -> dict[str, attrs.Attribute]:
    """The options of some groups by name."""
    return {field.name: field for group in groups for field in attrs.fields(group)}


def read(
    path: str | Path,
    fields: Fields,
    strict: bool = True,
    command: str | None = None,
    given: Mapping[str, Any] | None = None,
    tell: Tell = lambda _: None,
    stored: bool = False,
) -> dict[str, Any]:
    """The options that a YAML file sets, also one written for mlx-lm or mlx-lm-lora; `null` leaves an option at its default.

    Args:
        path: the YAML file.
        fields: the options that exist, by name.
        strict: whether a key that names none of them is an error; else it is left out.
        command: the training method, which a peer's `train_mode` has to be.
        given: options from elsewhere, which win.
        tell: is told what a peer's user should know.
        stored: whether a run wrote the file.

    Raises:
        InputError: unreadable file, unknown or repeated key, a value that the option does not take, or code that a file which
            came with a model wants to run.
    """
    return _read(path, fields, strict, command, given or {}, tell, stored).values


@frozen
class _File:
    """A file's options, its keys as they stand in it, and whose file it is."""

    values: dict[str, Any]
    keys: dict[str, Any]
    peer: peers.Peer | None


def _read(
    path: str | Path, fields: Fields, strict: bool, command: str | None, given: Mapping[str, Any], tell: Tell, stored: bool = False
) -> _File:
    entries = list(_entries(Path(path)))
    keys = {key: value for key, value, _ in entries}
    peer = peers.peer_of({key.split(".")[0] for key in keys})
    names, lines = {**ALIASES, **peers.aliases(command)}, {}
    for key, _, line in entries:
        name = key if key in fields else names.get(key, key)
        if name in lines:
            raise InputError(f"{path}:{line}: {key} is already set in line {lines[name]}; remove one of them")
        lines[name] = line
    placed = [(key, value, f"{path}:{line}") for key, value, line in entries]
    if command:
        _check_train(placed, given)
    values = _options(placed, fields, strict, command, peer, given, tell)
    values = _settled(values, peer, keys, {**values, **given}, tell)
    trust.check_config(path, values, given, lines, stored=stored)
    if peer and strict and command:
        for note in peers.notes(peer, str(path), {**values, **given}, fields):
            tell(note)
    return _File(values, keys, peer)


@frozen
class Typed:
    """A command line.

    Attributes:
        options: the options that it sets by flags of ours.
        others: its flags of peers, with their values.
        names: all its flags, as they are written.
    """

    options: Mapping[str, Any]
    others: Mapping[str, Any]
    names: Sequence[str]


def layered(typed: Typed, config: str | None, fields: Fields, strict: bool, command: str | None, tell: Tell) -> dict[str, Any]:
    """The options of a command line over those of the file of --config.

    A flag that only a peer has says that the line was written for that peer, and then it means what it means there.

    Args:
        typed: the command line.
        config: the file, if there is one.
        fields, strict, command, tell: as in `read`.
    """
    peer = peers.peer_of(typed.names)
    placed = ((key, value, dashed(key)) for key, value in typed.others.items())
    named = {**_options(placed, fields, True, command, peer, typed.options, tell), **typed.options}
    file = _read(config, fields, strict, command, named, tell) if config else _File({}, {}, None)
    keys = {**file.keys, **dict.fromkeys(typed.names, True), **typed.others}
    named = _settled(named, peer, keys, {**file.values, **named}, tell)
    values = {**file.values, **named}
    if peer and not file.peer:
        sign = next(name for name in typed.names if name in peer.signs)
        for note in peers.notes(peer, dashed(sign), values, fields):
            tell(note)
    return values


def _settled(
    values: dict[str, Any], peer: peers.Peer | None, keys: Mapping[str, Any], whole: Mapping[str, Any], tell: Tell
) -> dict[str, Any]:
    """What a peer's options come to there, and a word on those that come to nothing."""
    settled = peers.settle(values, peer, keys, whole)
    moot = [{"qat": "qat_bits", "xpo_alpha": "alpha"}.get(name, name) for name in values if name not in settled]
    if peer and moot:
        tell(f"without effect here, as in {peer.name}: {', '.join(moot)}")
    return settled


def _options(
    entries: Iterable[tuple[str, Any, str]],
    fields: Fields,
    strict: bool,
    command: str | None,
    peer: peers.Peer | None,
    given: Mapping[str, Any],
    tell: Tell,
) -> dict[str, Any]:
    """The options that entries (key, value, where it stands: a line of a file or a flag) set."""
    values: dict[str, Any] = {}
    turned: dict[str, Any] = {}  # from a peer's nested keys, which there win over flat ones
    unused: list[str] = []
    optimizer: tuple[Any, str] = (None, "")
    for key, value, location in entries:
        known = peers.find(key, peer) or peers.find(key)
        name = _option_of(key, known, fields, command, peer)
        if key == METHOD and command:
            _check_method(value, command, location)
        elif name:
            values |= {} if value is None else {name: _checked(fields[name], key, value, location)}
        elif known is None or (known.option and not peer and not known.turned and command not in known.lacking):
            _check_unknown(key, fields, location, strict, command)
        elif key == "optimizer_config":
            optimizer = (value, location)
        else:
            turned |= _turned(key, known, value, fields, command, location, tell)
            unused += [key] if _has_no_place(known, fields, command) else []
    if optimizer[0]:
        chosen = given.get("optimizer") or values.get("optimizer") or "adam"
        turned |= _checked_all("optimizer_config", lambda: peers.optimizer_options(optimizer[0], chosen), fields, optimizer[1])
    if unused and strict:
        tell(f"without effect on this command: {', '.join(unused)}")
    return {**values, **turned}


def _option_of(key: str, known: peers.Key | None, fields: Fields, command: str | None, peer: peers.Peer | None) -> str | None:
    """The option that a key is as it stands; None: it is none, or a peer's that means something else."""
    if known and (known.turned or (peer and not peers.of(known, command))):
        return None
    if key in fields:
        return key
    name = ALIASES.get(key) or (known.option if known and peers.of(known, command) else None)
    return name if name in fields else None


def _has_no_place(known: peers.Key, fields: Fields, command: str | None) -> bool:
    """Whether a peer's key belongs to other commands; what this one says of it instead is said elsewhere."""
    if known.option and known.option not in fields:
        return command not in known.lacking
    return not peers.of(known, command)


def _turned(
    key: str, known: peers.Key, value: Any, fields: Fields, command: str | None, location: str, tell: Tell
) -> dict[str, Any]:
    """What a peer's key that is no option comes to: options, a note, an error or nothing."""
    if key == "train_mode" and METHOD in fields and (method := peers.command_of(value)):
        return {METHOD: method}
    if command and key == "train_mode" and value is not None:
        path = f" -c {location.rpartition(':')[0]}" if not _is_flag(location) else ""
        return _checked_all(key, lambda: peers.check_mode(value, command, path) or {}, fields, location)
    if known.turned and value is not None and peers.of(known, command):
        return _checked_all(key, lambda: known.turned(value), fields, location)  # type: ignore[misc]
    place = location if _is_flag(location) else f"{location}: {key}"
    if command and command in known.lacking and value is not None:
        tell(f"{place}: {known.lacking[command]}")
    elif _speaks(known, value, command, _is_flag(location)):
        if known.fate == "refused":
            raise InputError(f"{place}: {plain(value)} has no counterpart here: {known.text}")
        tell(f"{place}: {known.text}")
    return {}


def _speaks(known: peers.Key, value: Any, command: str | None, typed: bool) -> bool:
    """Whether a peer's key that is no option is to be told about or refused; a flag that does nothing is told about too."""
    silent = known.fate == "ignored" and (not typed or known.option or known.turned)
    idle = any(value == idle and type(value) is type(idle) for idle in known.idle)
    return not silent and not idle and (command is None or peers.of(known, command))


def _is_flag(location: str) -> bool:
    return location.startswith("--")


def _checked_all(key: str, turn: Callable[[], dict[str, Any]], fields: Fields, location: str) -> dict[str, Any]:
    """The options of these fields that a peer's key turns into, each checked."""
    try:
        options = turn()
    except ValueError as error:
        raise InputError(f"{location}: {error}") from None
    prefix = "" if _is_flag(location) else f"{key}: "
    label = {name: name if name == key else f"{prefix}{name}" for name in options}
    return {name: _checked(fields[name], label[name], value, location) for name, value in options.items() if name in fields}


def dump(*groups: Any) -> dict[str, Any]:
    """The options of built groups as one flat mapping that `read` takes back, lists for tuples.

    >>> from mlxlora.config.options import SFTOptions
    >>> dump(SFTOptions(loss_type="dft"))
    {'loss_type': 'dft', 'neftune_noise_alpha': 0.0, 'objective': None}
    """
    flat = {name: value for group in groups for name, value in attrs.asdict(group, recurse=False).items()}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in flat.items()}


def build(group: type, values: Mapping[str, Any]) -> Any:
    """One group of options from those of `values` that it has."""
    return group(**{field.name: values[field.name] for field in attrs.fields(group) if field.name in values})


def gather(kinds: Sequence[type], groups: Sequence[Any], options: Mapping[str, Any]) -> dict[type, Any]:
    """One group of every kind: those given, the others from single options; a single option changes a given group.

    Raises:
        InputError: an option that no group has, or a group that the method does not take.
    """
    given = {type(group): group for group in groups}
    if unknown := [kind.__name__ for kind in given if kind not in kinds]:
        raise InputError(f"this method takes no {', '.join(unknown)}; it takes {', '.join(kind.__name__ for kind in kinds)}")
    fields = fields_of(*kinds)
    for name in options:
        if name not in fields:
            close = difflib.get_close_matches(name, fields, n=1)
            raise InputError(f"unknown option {name}" + (f"; did you mean {close[0]}?" if close else ""))
    mine = {kind: {f.name: options[f.name] for f in attrs.fields(kind) if f.name in options} for kind in kinds}
    return {kind: attrs.evolve(given[kind], **mine[kind]) if kind in given else kind(**mine[kind]) for kind in kinds}


def coerce(value: Any, kind: Any) -> Any:
    """A value as the type of an option; text is read as a flag would be, so YAML's `1e-5` is a number.

    >>> coerce("1e-5", float), coerce("q_proj, v_proj", tuple[str, ...]), coerce([1, 2], tuple[float, ...] | None)
    (1e-05, ('q_proj', 'v_proj'), (1.0, 2.0))

    Raises:
        ValueError: it is not one; the message says what is expected.
    """
    kind = plain_type(kind)
    if get_origin(kind) is Literal:
        return _choice(value, get_args(kind))
    if get_origin(kind) is tuple:
        return _tuple(value, get_args(kind)[0])
    return _PARSERS[kind](value)


def _choice(value: Any, choices: tuple[Any, ...]) -> Any:
    if value not in choices:
        raise ValueError(names_in(choices))
    return value


def _tuple(value: Any, kind: Any) -> tuple[Any, ...]:
    value = [f"{name}={item}" for name, item in value.items()] if isinstance(value, Mapping) else value
    items = [part.strip() for part in value.strip("[] ").split(",") if part.strip()] if isinstance(value, str) else value
    if not isinstance(items, list | tuple):
        raise ValueError("a list")
    try:
        return tuple(coerce(item, kind) for item in items)
    except ValueError as error:
        raise ValueError(f"a list, each {error}") from None


def _bool(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("true or false")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("text (in quotes)")
    return value


def _numeric(kind: Callable[[Any], Any], accepted: tuple[type, ...], expected: str) -> Callable[[Any], Any]:
    def parse(value: Any) -> Any:
        try:
            if isinstance(value, bool) or not isinstance(value, accepted):
                raise ValueError
            return kind(value)
        except ValueError:
            raise ValueError(expected) from None

    return parse


_PARSERS: dict[type, Callable[[Any], Any]] = {
    bool: _bool,
    int: _numeric(int, (int, str), "a whole number"),
    float: _numeric(float, (int, float, str), "a number"),
    str: _text,
}


def _checked(field: attrs.Attribute, key: str, value: Any, location: str) -> Any:
    name = location if dashed(key) == location else f"{location}: {key}"
    try:
        value = coerce(value, field.type)
    except ValueError as error:
        method = peers.command_of(value) if field.name == "train_type" else None
        hint = f"; that is a command: `mlxlora {method}`" if method else ""
        raise InputError(f"{name} must be {error}, got {quoted(value)}{hint}") from None
    try:
        if field.validator:  # attrs keeps an empty list
            field.validator(None, field, value)
    except InputError as error:
        raise InputError(f"{location}: {error}") from None
    return value


def _check_train(entries: Iterable[tuple[str, Any, str]], given: Mapping[str, Any]) -> None:
    """A peer's file may be for testing alone."""
    said = {key: (value, location) for key, value, location in entries}
    value, location = said.get(TRAIN, (True, ""))
    if value not in (True, None):
        folder = given.get("adapter_path") or said.get("adapter_path", ("adapters", ""))[0]
        how = f"mlxlora eval --adapter-path {plain(folder)} --split test -c {location.rpartition(':')[0]}"
        raise InputError(f"{location}: train must be true, got {quoted(value)}; to test without training, run `{how}`")


def _check_method(value: Any, command: str, location: str) -> None:
    """The options of another method's run mean something else."""
    if value not in (command, None):
        raise InputError(f"{location}: method is {plain(value)}; run `mlxlora {plain(value)} -c {location.rpartition(':')[0]}`")


def _check_unknown(key: str, fields: Fields, location: str, strict: bool, command: str | None) -> None:
    if not strict:
        return
    if _is_flag(location):
        raise InputError(f"No such option: {location}; see `mlxlora {command} --help`")
    aliases = {**ALIASES, **peers.aliases(command)}
    names = [*fields, *(alias for alias, name in aliases.items() if name in fields)]
    close = difflib.get_close_matches(key, names, n=1)
    hint = f"did you mean {close[0]}?" if close else "see --help for the options of this command"
    raise InputError(f"{location}: unknown key {listed([key])}; {hint}")


def _entries(path: Path) -> Iterator[tuple[str, Any, int]]:
    """(key, value, line) of a YAML mapping; keys of a nested mapping that has aliases are joined by a dot."""
    try:
        loader = _Loader(path.read_text(encoding="utf-8"))
        root = loader.get_single_node()
        if root is not None and not isinstance(root, yaml.MappingNode):
            raise InputError(f"{path}:1: expected `key: value` lines, got {quoted(_constructed(loader, root, path))}")
        yield from _walk(loader, root, path) if root is not None else ()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; --config takes a YAML file") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8 text; --config takes a YAML file") from None
    except RecursionError:
        raise InputError(f"{path}: lists or mappings within one another too deep; options need two levels") from None
    except yaml.YAMLError as error:
        raise InputError(_syntax(path, error)) from None


class _Loader(yaml.SafeLoader):
    """PyYAML's, whatever other libraries add to it: mlx-lm makes `._` a number, for the whole process."""

    yaml_implicit_resolvers = dict(yaml.resolver.Resolver.yaml_implicit_resolvers)  # noqa: RUF012


def _walk(loader: yaml.SafeLoader, node: yaml.MappingNode, path: Path, prefix: str = "") -> Iterator[tuple[str, Any, int]]:
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            raise InputError(f"{path}:{line}: a key must be text, got {quoted(_constructed(loader, key_node, path))}")
        key = prefix + key_node.value.replace("-", "_")
        if isinstance(value_node, yaml.MappingNode) and any(alias.startswith(key + ".") for alias in ALIASES):
            yield from _walk(loader, value_node, path, key + ".")
        else:
            yield key, _constructed(loader, value_node, path), line


def _constructed(loader: yaml.SafeLoader, node: yaml.Node, path: Path) -> Any:
    """The value of a node; PyYAML lets the errors of `!!bool x` and `!!int x` through."""
    try:
        return loader.construct_object(node, deep=True)
    except yaml.YAMLError:
        raise
    except Exception:
        raise InputError(f"{path}:{node.start_mark.line + 1}: not a value of YAML: {quoted(node.value)}") from None


def _syntax(path: Path, error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    location = f"{path}:{mark.line + 1}" if mark else str(path)
    return f"{location}: not valid YAML: {getattr(error, 'problem', None) or str(error).splitlines()[0]}"
