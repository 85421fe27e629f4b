"""Options in layers: flags win over a YAML file, a file over the starter's defaults, these over the built-in ones.

Every option is a YAML key of the same name, with dashes or underscores. This module reads such a file, checks every value
against the type and the checks of its option, and reads the flags and files of mlx-lm and mlx-lm-lora.
"""

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
from attrs import evolve, field, frozen

from ..errors import InputError, listed, plain, quoted
from ..utils import trust
from . import mlx_lm_compat as compat
from .fields import dashed
from .given import check_storable
from .method_options import build as build
from .method_options import dump as dump
from .method_options import fields_of as fields_of
from .mlx_lm_compat import Commands
from .mlx_lm_keys import Key, Peer
from .values import coerce
from .yaml_file import entries

ALIASES = {
    "num_epochs": "epochs",
    "lr": "learning_rate",
    "temp": "temperature",
    "dpo_loss_type": "loss_type",
    "lora_parameters.rank": "rank",
    "lora_parameters.scale": "scale",
    "lora_parameters.dropout": "dropout",
    "lora_parameters.keys": "lora_keys",
}
"""Other names of an option, besides those of mlx-lm and mlx-lm-lora; a dot separates the keys of a nested mapping."""

_NESTED = {alias.partition(".")[0] for alias in ALIASES if "." in alias}

TRAIN = "train"
"""mlx-lm's switch between training and testing; accepted, because the subcommand already says it."""

METHOD = "method"
"""The key for the method in a run's own file: training commands check it, `preview` has an option of this name."""


def _silent(_: str) -> None:
    """Drops a note."""


@frozen
class Reading:
    """How keys and flags become options.

    Attributes:
        fields: the options that exist, by name.
        command: the training command; None: the command does not train.
        strict: whether an unknown key is an error; if not, it is ignored.
        note: gets what a user of mlx-lm or mlx-lm-lora should know.
        commands: the training commands, which `train_mode` may name.
        peer: the library that the keys were written for, if not mlxlora.
    """

    fields: Mapping[str, attrs.Attribute]
    command: str | None = None
    strict: bool = True
    note: Callable[[str], Any] = _silent
    commands: Commands = field(factory=Commands)
    peer: Peer | None = None


@frozen
class Entry:
    """A key or a flag of a peer with its value.

    Attributes:
        key: with underscores for dashes.
        value: as YAML reads it, or the text of a flag.
        location: `file:line`, or the flag.
    """

    key: str
    value: Any
    location: str

    @property
    def is_flag(self) -> bool:
        """Whether it was typed on the command line."""
        return self.location.startswith("--")

    @property
    def file(self) -> str:
        """The file that it is in; empty for a flag."""
        return "" if self.is_flag else self.location.rpartition(":")[0]

    @property
    def place(self) -> str:
        """The beginning of a message about it."""
        return self.location if self.is_flag else f"{self.location}: {self.key}"


@frozen
class ConfigFile:
    """The options that a file sets, its keys as written, and the library that it was written for."""

    values: Mapping[str, Any] = field(factory=dict)
    keys: Mapping[str, Any] = field(factory=dict)
    peer: Peer | None = None


@frozen
class CommandLine:
    """What was typed.

    Attributes:
        options: the options that flags of mlxlora set.
        others: flags of mlx-lm and mlx-lm-lora with their values.
        names: all flags, as they were typed.
    """

    options: Mapping[str, Any]
    others: Mapping[str, Any]
    names: Sequence[str]


def read_config(
    path: str | Path, reading: Reading, given: Mapping[str, Any] | None = None, *, stored: bool = False
) -> dict[str, Any]:
    """The options that a YAML file sets, also a file written for mlx-lm or mlx-lm-lora; `null` leaves an option at its default.

    Args:
        path: the YAML file.
        reading: how its keys become options.
        given: options from elsewhere, which win.
        stored: whether a run wrote the file.

    Raises:
        InputError: unreadable file, unknown or repeated key, a value that the option does not take, or code that a file which
            came with a model wants to run.
    """
    return dict(_read(path, reading, given or {}, stored=stored).values)


def layered(typed: CommandLine, config: str | None, reading: Reading) -> dict[str, Any]:
    """The options of a command line over those of the file of --config.

    A flag that only a peer has shows that the line was written for that peer. Then every flag means what it means there.

    Args:
        typed: the command line.
        config: the file, if there is one.
        reading: how keys and flags become options.

    Raises:
        InputError: as `read_config`, and flags of peers that have no counterpart.
    """
    peer = compat.peer_of(typed.names)
    flags = [Entry(key, value, dashed(key)) for key, value in typed.others.items()]
    named = {**_options(flags, evolve(reading, strict=True, peer=peer), typed.options), **typed.options}
    file = _read(config, reading, named) if config else ConfigFile()
    keys = {**file.keys, **dict.fromkeys(typed.names, True), **typed.others}
    named = _settled(named, evolve(reading, peer=peer), keys, {**file.values, **named})
    values = {**file.values, **named}
    if peer and not file.peer:
        sign = next(name for name in typed.names if name in peer.signs)
        for note in compat.notes(peer, dashed(sign), values, reading.fields):
            reading.note(note)
    return values


def _read(path: str | Path, reading: Reading, given: Mapping[str, Any], *, stored: bool = False) -> ConfigFile:
    placed = [(key, value, line) for key, value, line in entries(Path(path), _NESTED)]
    keys = {key: value for key, value, _ in placed}
    peer = compat.peer_of({key.split(".")[0] for key in keys})
    lines = _lines(path, placed, reading)
    found = [Entry(key, value, f"{path}:{line}") for key, value, line in placed]
    if reading.command:
        _check_train(found, given)
    reading = evolve(reading, peer=peer)
    values = _options(found, reading, given)
    values = _settled(values, reading, keys, {**values, **given})
    trust.check_config(path, values, given, lines, stored=stored)
    check_storable(
        {name: value for name, value in values.items() if name not in given},
        lambda name: f"{path}:{lines[name]}: {name}" if name in lines else f"{path}: {name}",
    )
    if peer and reading.strict and reading.command:
        for note in compat.notes(peer, str(path), {**values, **given}, reading.fields):
            reading.note(note)
    return ConfigFile(values, keys, peer)


def _lines(path: str | Path, placed: Iterable[tuple[str, Any, int]], reading: Reading) -> dict[str, int]:
    """The line of each option; two keys for one option are an error."""
    names, lines = {**ALIASES, **compat.aliases(reading.command)}, {}
    for key, _, line in placed:
        name = key if key in reading.fields else names.get(key, key)
        if name in lines:
            raise InputError(f"{path}:{line}: {key} is already set in line {lines[name]}; remove one of them")
        lines[name] = line
    return lines


def _settled(values: dict[str, Any], reading: Reading, keys: Mapping[str, Any], run: Mapping[str, Any]) -> dict[str, Any]:
    """The options that have an effect in the peer's own runs; notes the others."""
    settled = compat.settle(values, reading.peer, keys, run)
    idle = [{"qat": "qat_bits", "xpo_alpha": "alpha"}.get(name, name) for name in values if name not in settled]
    if reading.peer and idle:
        reading.note(f"without effect here, as in {reading.peer.name}: {', '.join(idle)}")
    return settled


def _options(found: Iterable[Entry], reading: Reading, given: Mapping[str, Any]) -> dict[str, Any]:
    """The options that entries set."""
    values: dict[str, Any] = {}
    converted: dict[str, Any] = {}  # a peer's nested keys win over its flat ones
    unused: list[str] = []
    optimizer: Entry | None = None
    for entry in found:
        known = compat.find(entry.key, reading.peer) or compat.find(entry.key)
        name = _option_of(entry.key, known, reading)
        if entry.key == METHOD and reading.command:
            _check_method(entry, reading.command)
        elif name:
            values |= {} if entry.value is None else {name: _checked(reading, name, entry.key, entry)}
        elif known is None or (known.option and not reading.peer and not known.convert and reading.command not in known.absent):
            _check_unknown(entry, reading)
        elif entry.key == "optimizer_config":
            optimizer = entry
        else:
            converted |= _converted(entry, known, reading)
            unused += [entry.key] if _has_no_place(known, reading) else []
    if optimizer and optimizer.value:
        chosen, config = given.get("optimizer") or values.get("optimizer") or "adam", optimizer.value
        converted |= _checked_all(optimizer, lambda: compat.optimizer_options(config, chosen), reading)
    if unused and reading.strict:
        reading.note(f"without effect on this command: {', '.join(unused)}")
    return {**values, **converted}


def _option_of(key: str, known: Key | None, reading: Reading) -> str | None:
    """The option that a key stands for without conversion; None: it is none, or a peer's with another meaning."""
    if known and (known.convert or (reading.peer and not compat.applies(known, reading.command))):
        return None
    if key in reading.fields:
        return key
    name = ALIASES.get(key) or (known.option if known and compat.applies(known, reading.command) else None)
    return name if name in reading.fields else None


def _has_no_place(known: Key, reading: Reading) -> bool:
    """Whether a peer's key belongs to other commands, and no message of its own says so."""
    if known.option and known.option not in reading.fields:
        return reading.command not in known.absent
    return not compat.applies(known, reading.command)


def _converted(entry: Entry, known: Key, reading: Reading) -> dict[str, Any]:
    """The options that a peer's key becomes; a key that becomes none is noted, refused or ignored, as the table says."""
    value, command = entry.value, reading.command
    if entry.key == "train_mode" and METHOD in reading.fields and (method := reading.commands.named(value)):
        return {METHOD: method}
    if command and entry.key == "train_mode" and value is not None:
        path = f" -c {entry.file}" if entry.file else ""
        return _checked_all(entry, lambda: compat.check_mode(value, command, path, reading.commands.modes) or {}, reading)
    convert = known.convert
    if convert and value is not None and compat.applies(known, command):
        return _checked_all(entry, lambda: convert(value), reading)
    if command and command in known.absent and value is not None:
        reading.note(f"{entry.place}: {known.absent[command]}")
    elif _speaks(entry, known, command):
        if known.fate == "refused":
            raise InputError(f"{entry.place}: {plain(value)} has no counterpart here: {known.text}")
        reading.note(f"{entry.place}: {known.text}")
    return {}


def _speaks(entry: Entry, known: Key, command: str | None) -> bool:
    """Whether a peer's key that becomes no option is noted or refused; a flag without effect is noted too."""
    silent = known.fate == "ignored" and (not entry.is_flag or known.option or known.convert)
    idle = any(entry.value == idle and type(entry.value) is type(idle) for idle in known.idle)
    return not silent and not idle and (command is None or compat.applies(known, command))


def _checked_all(entry: Entry, convert: Callable[[], dict[str, Any]], reading: Reading) -> dict[str, Any]:
    """The options of this command that a peer's key becomes, each checked."""
    try:
        options = convert()
    except ValueError as error:
        raise InputError(f"{entry.location}: {error}") from None
    prefix = "" if entry.is_flag else f"{entry.key}: "
    labels = {name: name if name == entry.key else f"{prefix}{name}" for name in options}
    return {
        name: _checked(reading, name, labels[name], evolve(entry, value=value))
        for name, value in options.items()
        if name in reading.fields
    }


def _checked(reading: Reading, name: str, label: str, entry: Entry) -> Any:
    """The value of an entry as its option takes it; `label` is the option's name in a message."""
    option, location = reading.fields[name], entry.location
    subject = location if dashed(label) == location else f"{location}: {label}"
    try:
        value = coerce(entry.value, option.type)
    except ValueError as error:
        method = reading.commands.named(entry.value) if name == "train_type" else None
        hint = f"; that is a command: `mlxlora {method}`" if method else ""
        raise InputError(f"{subject} must be {error}, got {quoted(entry.value)}{hint}") from None
    try:
        if option.validator:  # attrs keeps an empty list
            option.validator(None, option, value)
    except InputError as error:
        raise InputError(f"{location}: {error}") from None
    return value


def _check_train(found: Iterable[Entry], given: Mapping[str, Any]) -> None:
    """Refuses a peer's file for testing alone."""
    by_key = {entry.key: entry for entry in found}
    entry = by_key.get(TRAIN)
    if entry and entry.value not in (True, None):
        folder = given.get("adapter_path") or (by_key["adapter_path"].value if "adapter_path" in by_key else "adapters")
        how = f"mlxlora eval --adapter-path {plain(folder)} --split test -c {entry.file}"
        raise InputError(f"{entry.location}: train must be true, got {quoted(entry.value)}; to test without training, run `{how}`")


def _check_method(entry: Entry, command: str) -> None:
    """Refuses the file of a run of another method, whose options have other meanings."""
    if entry.value not in (command, None):
        method = plain(entry.value)
        raise InputError(f"{entry.location}: method is {method}; run `mlxlora {method} -c {entry.file}`")


def _check_unknown(entry: Entry, reading: Reading) -> None:
    if not reading.strict:
        return
    if entry.is_flag:
        raise InputError(f"No such option: {entry.location}; see `mlxlora {reading.command} --help`")
    aliases = {**ALIASES, **compat.aliases(reading.command)}
    names = [*reading.fields, *(alias for alias, name in aliases.items() if name in reading.fields)]
    close = difflib.get_close_matches(entry.key, names, n=1)
    hint = f"did you mean {close[0]}?" if close else "see --help for the options of this command"
    raise InputError(f"{entry.location}: unknown key {listed([entry.key])}; {hint}")
