"""Renders a Jinja chat template and keeps, for every character, the message that it comes from.

The template runs as transformers runs it, in an environment of its own: messages are traced strings, and each loop over
messages tells which one it writes. So the template's own text is attributed too: headers, reasoning tags, ends of turns.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from functools import lru_cache, wraps
from typing import Any, NamedTuple

from jinja2 import Environment, nodes, pass_environment
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import make_attrgetter
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer
from markupsafe import Markup

from .traced_text import (
    Origin,
    Traced,
    TracedMessage,
    TracedObject,
    blended,
    joined,
    marked,
    message_of,
    traceable,
    traced_value,
    writing,
    written,
)

_ESCAPING = ("e", "escape", "forceescape", "safe")


class Span(NamedTuple):
    """Characters [start, stop) of a rendered text, and their origin."""

    start: int
    stop: int
    origin: Origin


class Rendering(NamedTuple):
    """A rendered conversation.

    Attributes:
        text: all of it.
        spans: its characters by origin, in order.
        lost: whether the origin of some message's characters is not known.
        printed: whether an object of a message was printed in Python's notation, which no model writes.
    """

    text: str
    spans: list[Span]
    lost: bool
    printed: bool


def render_traced(template: str, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]) -> Rendering:
    """A conversation under a template.

    Args:
        template: its Jinja source.
        messages: as transformers gives them to templates.
        variables: what else the template reads, such as tools and bos_token.

    Raises:
        Exception: whatever the template raises.
    """
    traced = [
        TracedMessage({key: traced_value(value, i, key) for key, value in message.items()}) for i, message in enumerate(messages)
    ]
    writing.start()
    texts, spans, at = [], [], 0
    compiled, escapes = _compiled(template)
    for chunk in compiled.generate(messages=traced, **variables):
        texts.append(chunk)
        for length, origin in written(chunk):
            if spans and spans[-1].origin == origin:
                spans[-1] = spans[-1]._replace(stop=at + length)
            else:
                spans.append(Span(at, at + length, origin))
            at += length
    return Rendering("".join(texts), spans, writing.lost or escapes, writing.printed)


@lru_cache(maxsize=32)
def _compiled(template: str) -> tuple[Any, bool]:
    """The template, and whether it has constants that escape what is added to them, without origins."""
    environment = _TracedEnvironment()
    tree = environment.parse(template)
    escapes = any(isinstance(node.node, nodes.Const) and node.name in _ESCAPING for node in tree.find_all(nodes.Filter))
    return environment.from_string(_Instrument().visit(tree)), escapes


class _Instrument(NodeTransformer):
    """Adds to a template's loops what tells the environment which message is being written."""

    def __init__(self) -> None:
        self.loops = 0

    def visit_For(self, node: nodes.For) -> list[nodes.Node]:
        self.loops += 1
        node = self.generic_visit(node)  # pyright: ignore[reportAssignmentType]
        self.loops -= 1
        node.body = [_call("enter_iteration", node.target), *node.body]
        return [_call("enter_loop"), node, _call("leave_loop")]

    def visit_Assign(self, node: nodes.Assign) -> nodes.Node | list[nodes.Node]:
        node = self.generic_visit(node)  # pyright: ignore[reportAssignmentType]
        return [node, _call("assigned", node.target)] if self.loops and isinstance(node.target, nodes.Name) else node

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
        loops, self.loops = self.loops, 0
        node = self.generic_visit(node)  # pyright: ignore[reportAssignmentType]
        self.loops = loops
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        node = self.generic_visit(node)  # pyright: ignore[reportAssignmentType]
        return _environment_call("concatenated", node.nodes)


def _call(name: str, target: nodes.Node | None = None) -> nodes.ExprStmt:
    names = [] if target is None else [target] if isinstance(target, nodes.Name) else list(target.find_all(nodes.Name))
    return nodes.ExprStmt(_environment_call(name, [nodes.Name(name.name, "load") for name in names]))


def _environment_call(name: str, arguments: Sequence[nodes.Expr]) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(name), list(arguments), [], None, None)


class _TracedEnvironment(ImmutableSandboxedEnvironment):
    """The environment in which transformers runs chat templates, for traced strings."""

    intercepted_binops = frozenset(["%"])

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        self.filters = {name: _carrying(function) for name, function in self.filters.items()}
        self.filters |= {"tojson": _tojson, "join": _join, "safe": _safe}
        self.globals |= {"raise_exception": _refuse, "strftime_now": _now, "dict": _Dict(), "namespace": _Namespace}

    def getattr(self, obj: Any, attribute: str) -> Any:
        if isinstance(obj, TracedMessage | TracedObject) and attribute in obj and not hasattr(dict, attribute):
            return obj[attribute]  # as jinja finds it, without an exception on the way
        return super().getattr(obj, attribute)

    def concat(self, parts: Iterator[str]) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return joined(parts)

    def concatenated(self, *parts: Any) -> str:
        """The operator ~."""
        return joined(str(part) for part in parts)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        result = super().call(__context, traceable(__obj), *args, **kwargs)
        return _carried(result, (args, kwargs)) if args or kwargs else result

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        return _carried(super().call_binop(context, operator, left, right), (left, right))

    def enter_loop(self) -> None:
        """A loop begins."""
        writing.loops.append((writing.turn, False))

    def enter_iteration(self, *targets: Any) -> None:
        """An iteration begins: over messages, the template writes this one."""
        message = next((found for target in targets if (found := message_of(target)) is not None), None)
        outer, _ = writing.loops[-1]
        writing.loops[-1] = (outer, message is not None)
        writing.turn = outer if message is None else message

    def assigned(self, value: Any) -> None:
        """A variable is set: in a loop over numbers, to the message that the template writes."""
        _, over_messages = writing.loops[-1]
        message = None if over_messages else message_of(value)
        if message is not None:
            writing.turn = message

    def leave_loop(self) -> None:
        """A loop ends."""
        writing.turn, _ = writing.loops.pop()


class _Generation(Extension):
    """`{% generation %}`: text that the template's author marks as the model's."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_support"), [], [], body).set_lineno(line)

    def _support(self, caller: Any) -> str:
        return marked(caller())


class _Dict:
    """`dict` without its attributes, as transformers has it."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args, **kwargs)


class _Namespace(Namespace):
    """A namespace without private names, as transformers has it."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # pyright: ignore[reportSelfClsParameterName]
        for name in (attributes := dict(*args[1:], **kwargs)):
            _check_name(name)
        Namespace.__init__(args[0], attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a chat template cannot store {name!r} on a namespace")


def _carried(result: Any, sources: Any) -> Any:
    """The result of an operation, with the origins of what it was made of."""
    if isinstance(result, Markup):
        writing.lost = True  # it escapes what is added to it, and origins are gone
        return result
    return blended(result, sources) if type(result) is str else result


def _carrying(function: Any) -> Any:
    @wraps(function)  # the marks of filters that take an environment or a context are attributes
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return _carried(function(*args, **kwargs), (args, kwargs))

    return wrapper


def _tojson(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False) -> str:
    text = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    return blended(text, value)


def _safe(value: Any) -> str:
    return value if isinstance(value, Traced) else _carried(Markup(value), ())


@pass_environment
def _join(environment: Environment, value: Any, d: str = "", attribute: Any = None) -> str:
    items = map(make_attrgetter(environment, attribute), value) if attribute is not None else value
    return Traced(d).join([str(item) for item in items])


def _refuse(message: str) -> None:
    raise TemplateError(message)


def _now(form: str) -> str:
    return datetime.now().strftime(form)
