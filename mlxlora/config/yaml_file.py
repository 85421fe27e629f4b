"""The keys of a YAML file with the lines that they are in."""

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import yaml

from ..errors import InputError, quoted
from ..utils.parse import PlainLoader, check_node, yaml_text


def entries(path: Path, nested: Collection[str]) -> Iterator[tuple[str, Any, int]]:
    """(key, value, line) of each key of a YAML mapping, with underscores for dashes.

    Args:
        path: the file.
        nested: keys whose mappings are read as keys of their own, joined by a dot: `lora_parameters.rank`.

    Raises:
        InputError: the file cannot be read, or is not a mapping with text keys.
    """
    try:
        loader = PlainLoader(yaml_text(path, "--config"))
        root = loader.get_single_node()
        check_node(root, str(path))
        if root is not None and not isinstance(root, yaml.MappingNode):
            raise InputError(f"{path}:1: expected `key: value` lines, got {quoted(_constructed(loader, root, path))}")
        yield from _walk(loader, root, path, nested) if root is not None else ()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; --config takes a YAML file") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8 text; --config takes a YAML file") from None
    except RecursionError:
        raise InputError(f"{path}: lists or mappings are nested too deeply; options need two levels") from None
    except yaml.YAMLError as error:
        raise InputError(_syntax(path, error)) from None


def _walk(
    loader: yaml.SafeLoader, node: yaml.MappingNode, path: Path, nested: Collection[str], prefix: str = ""
) -> Iterator[tuple[str, Any, int]]:
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            raise InputError(f"{path}:{line}: a key must be text, got {quoted(_constructed(loader, key_node, path))}")
        key = prefix + key_node.value.replace("-", "_")
        if isinstance(value_node, yaml.MappingNode) and key in nested:
            yield from _walk(loader, value_node, path, nested, key + ".")
        else:
            yield key, _constructed(loader, value_node, path), line


def _constructed(loader: yaml.SafeLoader, node: yaml.Node, path: Path) -> Any:
    """The value of a node; PyYAML raises a KeyError or ValueError for `!!bool x` and `!!int x`."""
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
