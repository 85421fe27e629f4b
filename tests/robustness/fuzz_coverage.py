"""The parsers of fuzz.py again, led by coverage: atheris changes inputs that reached new lines of mlxlora.

    python -m tests.robustness.fuzz_coverage --target rows --minutes 1

An optional tool, which needs `pip install atheris`. It starts from cases of fuzz.py; what it finds wrong ends it with the input.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

SEEDS = 200
"""Cases of fuzz.py to begin with."""

Case = Callable[[bytes], Any]


def cases() -> dict[str, tuple[str, Case, Callable[[Any], bytes]]]:
    """By name: the target of fuzz.py, bytes to a case of it, and a case to bytes."""
    from tests.robustness.fuzz_files import arrays_of, packed

    header, data = arrays_of(peft=False)
    weights = packed(json.dumps(header).encode(), data)
    config = b"model: m\ndata: d\nmethod: sft\n"
    return {
        "rows": ("rows", lambda data: (".jsonl", data[1:], data[0] % 8 if data else 0), lambda case: b"\0" + case[1]),
        "config": ("yaml", lambda data: (data[1:], data[0] % 8 if data else 0), lambda case: b"\0" + case[0]),
        "adapter_config": ("adapters", lambda data: ("attach", data, weights), lambda case: case[1]),
        "safetensors": ("safetensors", lambda data: data, lambda case: case),
        "metrics": ("runs", lambda data: (config, data, b""), lambda case: case[1]),
    }


def main() -> None:
    """Runs one target; atheris ends the process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", choices=("rows", "config", "adapter_config", "safetensors", "metrics"), required=True)
    parser.add_argument("--minutes", type=float, default=1.0)
    asked = parser.parse_args()
    try:
        import atheris
    except ImportError:
        sys.exit("fuzz_coverage needs atheris: pip install atheris")
    with atheris.instrument_imports(include=["mlxlora"]):
        from tests.robustness import fuzz

        name, case_of, bytes_of = cases()[asked.target]
        target = fuzz.TARGETS[name]()
        place = tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None)
        folder, corpus = Path(place, "work"), Path(place, "corpus")
        folder.mkdir()
        corpus.mkdir()
        rng = random.Random(asked.target)
        for i in range(SEEDS):
            case = target.make(rng)
            (corpus / str(i)).write_bytes(bytes_of(case))
            with contextlib.suppress(Exception):
                target.call(folder, case)  # imports what the target needs
            fuzz.clean(folder)
    warnings.simplefilter("ignore")
    tally, began = fuzz.Tally(), time.monotonic()

    def once(data: bytes) -> None:
        problem = fuzz.attempt(target, folder, case_of(data), tally)
        if problem:
            raise AssertionError(problem)
        if time.monotonic() - began > 60 * asked.minutes:
            print(f"{fuzz.HEADING}\n{tally.row(asked.target)}", flush=True)
            shutil.rmtree(place)
            os._exit(0)  # libFuzzer has no other end

    atheris.Setup([sys.argv[0], str(corpus), "-max_len=4096", "-timeout=60"], once)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
