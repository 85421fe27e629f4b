"""Choices that depend on the machine: the alternatives are timed once, and what they took is kept on disk.

Nothing here knows what is chosen. A question has a key, which names everything that its answer depends on beside the machine, and
alternatives, each of which is timed by a call.
"""

import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

import mlx.core as mx
import orjson
from attrs import define, frozen

from ..errors import InputError
from .device import backend, device_memory, device_name, out_of_memory, package_version
from .files import atomic_file, cache_folder

GAIN = 0.05  # of the time: what a faster alternative must gain to be worth more memory
_BUDGET, _MOST = 0.15, 5  # seconds and repetitions of one alternative


@frozen
class Timing:
    """What one alternative takes.

    Attributes:
        seconds: of one call.
        bytes: that it adds to those in use.
    """

    seconds: float
    bytes: int


Alternatives = Mapping[str, Callable[[], Timing]]


@frozen
class Measurement:
    """What the alternatives of a question take; those that ran out of memory are not there.

    Attributes:
        timings: by name of the alternative; at least one.
    """

    timings: Mapping[str, Timing]

    @property
    def best(self) -> str:
        """The fastest one; of those that take at most 5 % longer, the one that takes the least memory.

        >>> Measurement({"a": Timing(1.00, 9), "b": Timing(1.04, 1), "c": Timing(1.06, 0)}).best
        'b'
        """
        limit = min(timing.seconds for timing in self.timings.values()) * (1 + GAIN)
        near = {name: timing for name, timing in self.timings.items() if timing.seconds <= limit}
        return min(near, key=lambda name: (near[name].bytes, near[name].seconds))

    @property
    def seconds(self) -> float:
        """Of all alternatives together."""
        return sum(timing.seconds for timing in self.timings.values())

    def told(self) -> str:
        """The best one, then the others.

        >>> Measurement({"a": Timing(0.012, 9_000_000), "b": Timing(0.004, 120_000_000)}).told()
        'b (4.0 ms, 120 MB; a 12.0 ms, 9 MB)'
        """
        best = self.best
        taken = {name: f"{1e3 * timing.seconds:.1f} ms, {timing.bytes / 1e6:.0f} MB" for name, timing in self.timings.items()}
        others = "".join(f"; {name} {text}" for name, text in taken.items() if name != best)
        return f"{best} ({taken[best]}{others})"


def compared(alternatives: Alternatives) -> Measurement | None:
    """Times the alternatives; None if all of them run out of memory."""
    timings: dict[str, Timing] = {}
    for name, call in alternatives.items():
        try:
            timings[name] = call()
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
        mx.clear_cache()
    return Measurement(timings) if timings else None


def timing_of(call: Callable[[], object]) -> Timing:
    """Times a call that evaluates what it computes: the fastest of a few, after one that compiles."""
    call()
    mx.synchronize()
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    seconds: list[float] = []
    while len(seconds) < _MOST and sum(seconds) < _BUDGET:
        began = time.perf_counter()
        call()
        mx.synchronize()
        seconds.append(time.perf_counter() - began)
    return Timing(min(seconds), max(mx.get_peak_memory() - before, 0))


# --- on disk ----------------------------------------------------------------------------------------


@define
class Measurements:
    """What was measured on this machine, by key.

    Attributes:
        path: a JSON file; another machine, device or version has another one.
        known: of this process.
    """

    path: Path
    known: dict[str, Measurement]

    def of(self, key: str, alternatives: Alternatives, *, again: bool = False) -> Measurement | None:
        """What the alternatives take: as known, or measured now and kept; `again` measures in any case."""
        if not again and (found := self.known.get(key)):
            return found
        if (found := compared(alternatives)) is not None:
            self.known[key] = found
            self._keep(key, found)
        return found

    def _keep(self, key: str, measurement: Measurement) -> None:
        """Adds one to the file, beside what other processes added; a folder that cannot be written to keeps nothing."""
        merged = {**_read(self.path), key: measurement}
        with suppress(OSError, InputError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(self.path) as temporary:
                temporary.write_bytes(orjson.dumps(_written(merged), option=orjson.OPT_INDENT_2))


def measuring() -> bool:
    """Whether runs measure; MLXLORA_MEASURE=off says no: constants decide, so that no number depends on a clock."""
    return os.environ.get("MLXLORA_MEASURE") != "off"


def measurements() -> Measurements:
    """Those of this machine that earlier processes kept."""
    path = cache_folder("measured") / f"{sha256(orjson.dumps(machine())).hexdigest()[:16]}.json"
    return Measurements(path, _read(path))


def machine() -> dict[str, Any]:
    """What the answers depend on, whatever the question is."""
    versions = {name: package_version(name) for name in ("mlx", "mlxlora")}
    return {"backend": backend(), "device": device_name(), "memory": device_memory(), **versions}


def _written(known: Mapping[str, Measurement]) -> dict[str, Any]:
    of = {key: {name: [t.seconds, t.bytes] for name, t in found.timings.items()} for key, found in known.items()}
    return {"machine": machine(), "measured": of}


def _read(path: Path) -> dict[str, Measurement]:
    """What a file holds; nothing if there is none, or if it is damaged or of another machine."""
    try:
        content = orjson.loads(path.read_bytes())
        if content["machine"] != machine():
            return {}
        return {key: _measurement(timings) for key, timings in content["measured"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _measurement(timings: Mapping[str, Any]) -> Measurement:
    found = {name: Timing(float(seconds), int(size)) for name, (seconds, size) in timings.items()}
    if not found or not all(t.seconds > 0 and t.bytes >= 0 for t in found.values()):
        raise ValueError("a measurement needs times above 0")
    return Measurement(found)
