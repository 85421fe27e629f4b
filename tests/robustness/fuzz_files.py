"""Safetensors and adapter folders for fuzz.py."""

import contextlib
import json
import random
import shutil
import struct
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from tests.robustness.fuzz_mutations import JSON, Target, mutated_bytes, mutated_json

# --- safetensors --------------------------------------------------------------------------------


def packed(header: bytes, data: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", (len(header) if length is None else length) % 2**64) + header + data


def entry(dtype: str, shape: Sequence[int], start: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


TENSORS = {
    "__metadata__": {"format": "mlx", "sha256": "0"},
    "a": entry("F32", (2, 3), 0, 24),
    "b.weight": entry("BF16", (4,), 24, 32),
    "c": entry("I64", (), 32, 40),
    "d": entry("U8", (0, 7), 40, 40),
}
NUMBERS = (0, 1, -1, 2, 3, 4, 7, 8, 24, 40, 2**31 - 1, 2**31, 2**32, 2**32 + 1, 2**62, 2**63, 2**64, 1.5)
DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I8", "U8", "U16", "BOOL", "F8_E4M3", "F4", "C64", "X", "")


def mutated_tensors(rng: random.Random, tensors: dict[str, Any]) -> dict[str, Any]:
    """Numbers, types and names of a header exchanged."""
    out = json.loads(json.dumps(tensors))
    for _ in range(rng.choice((0, 1, 1, 2, 3))):
        chosen = out.get(rng.choice([name for name in out if name != "__metadata__"] or [""]))
        if not isinstance(chosen, dict) or not isinstance(chosen.get("shape"), list):
            break
        match rng.randrange(4):
            case 0:
                chosen["dtype"] = rng.choice(DTYPES)
            case 1 if chosen["shape"]:
                chosen["shape"][rng.randrange(len(chosen["shape"]))] = rng.choice(NUMBERS)
            case 2:
                chosen["data_offsets"][rng.randrange(2)] = rng.choice(NUMBERS)
            case _:
                chosen["shape"].insert(0, rng.choice(NUMBERS))
    return out


def mutated_file(rng: random.Random, tensors: dict[str, Any], data: bytes) -> bytes:
    """A safetensors file."""
    header = json.dumps(mutated_tensors(rng, tensors)).encode()
    if rng.random() < 0.3:
        header = mutated_json(rng, json.loads(header))
    if rng.random() < 0.2:
        header = mutated_bytes(rng, header)
    data = mutated_bytes(rng, data) if rng.random() < 0.2 else data
    length = rng.choice(NUMBERS[:-1]) if rng.random() < 0.1 else None
    file = packed(header, data, length)
    return mutated_bytes(rng, file) if rng.random() < 0.2 else file


def make_safetensors(rng: random.Random) -> bytes:
    return mutated_file(rng, TENSORS, bytes(range(40)))


def call_safetensors(folder: Path, case: bytes) -> None:
    from mlxlora.adapters.files import read_arrays
    from mlxlora.utils.safetensors import read_checked

    file = folder.parent / "x.safetensors"
    file.write_bytes(case)
    with contextlib.suppress(ValueError):  # which its callers take for a damaged cache
        read_checked(file)
    read_arrays(file)


def safetensors_target() -> Target:
    number = st.integers(-1, 50) | st.sampled_from(NUMBERS)
    tensor = st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(DTYPES),
            "shape": st.lists(number, max_size=5),
            "data_offsets": st.lists(number, min_size=2, max_size=2),
        }
    )
    headers = st.dictionaries(st.text(max_size=8), tensor | JSON, max_size=4)
    files = st.builds(lambda h, d: packed(json.dumps(h).encode(errors="surrogatepass"), d), headers, st.binary(max_size=48))
    return Target(make_safetensors, files | st.binary(max_size=64), call_safetensors)


# --- adapter folders ----------------------------------------------------------------------------


@cache
def network() -> Any:
    from mlx_lm.models import llama

    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "intermediate_size": 8, "rms_norm_eps": 1e-5, "vocab_size": 16}
    return llama.Model(llama.ModelArgs.from_dict({"model_type": "llama", "num_attention_heads": 2, "head_dim": 4, **sizes}))


MODULES = ("self_attn.q_proj", "mlp.up_proj")
MLX = {
    "model": "m",
    "fine_tune_type": "lora",
    "num_layers": 1,
    "lora_parameters": {"rank": 2, "scale": 20.0, "dropout": 0.0, "keys": list(MODULES)},
    "quantize": "4",
}
PEFT = {
    "peft_type": "LORA",
    "base_model_name_or_path": "m",
    "r": 2,
    "lora_alpha": 4,
    "lora_dropout": 0.0,
    "target_modules": ["q_proj", "up_proj"],
    "use_dora": False,
    "use_rslora": False,
    "init_lora_weights": True,
    "rank_pattern": {},
    "alpha_pattern": {"q_proj": 8},
}


def arrays_of(peft: bool) -> tuple[dict[str, Any], bytes]:
    """Header and data of adapters that fit the network."""
    header, at = {}, 0
    for module in MODULES:
        for name, shape in (("lora_a", (8, 2)), ("lora_b", (2, 8))):
            key = (
                f"base_model.model.model.layers.0.{module}.{name[:-1]}{name[-1].upper()}.weight"
                if peft
                else f"model.layers.0.{module}.{name}"
            )
            header[key] = entry("F32", shape[::-1] if peft else shape, at, at + 64)
            at += 64
    return header, bytes(at)


def make_adapters(rng: random.Random) -> tuple[str, bytes, bytes]:
    """(what is done with it, configuration, weights)."""
    use = rng.choice(("attach", "start", "merge", "peft"))
    header, data = arrays_of(use == "peft")
    settings_ = PEFT if use == "peft" else MLX
    weights = mutated_file(rng, header, data) if rng.random() < 0.4 else packed(json.dumps(header).encode(), data)
    if use != "peft" and rng.random() < 0.2:
        settings_ = {**MLX, "fine_tune_type": rng.choice(("dora", "full"))}
    return use, mutated_json(rng, settings_), weights


def call_adapters(folder: Path, case: tuple[str, bytes, bytes]) -> None:
    from mlxlora.adapters import merge as merging
    from mlxlora.adapters import prepare as adapters
    from mlxlora.adapters.files import CONFIG, WEIGHTS
    from mlxlora.adapters.peft import PEFT_WEIGHTS
    from mlxlora.config.options import AdapterOptions

    use, config, weights = case
    place = folder.parent / "adapters"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    (place / CONFIG).write_bytes(config)
    (place / (PEFT_WEIGHTS if use == "peft" else WEIGHTS)).write_bytes(weights)
    if use == "attach":
        with adapters.attached(network(), place):
            pass
    elif use == "start":
        model = _fresh()
        adapters.prepare(model, AdapterOptions(rank=2, lora_keys=MODULES))
        adapters.load_weights(model, place)
    elif use == "merge":
        merging.merge([place, place], folder / "merged")
    else:
        _import(place, folder / "imported")


def _import(place: Path, output: Path) -> None:
    from mlxlora.adapters import peft
    from mlxlora.config.options import ModelOptions

    real, peft.load_with_config = peft.load_with_config, lambda *_, **__: (_fresh(), None, {})
    try:
        peft.from_peft(place, ModelOptions(model="m"), output)
    finally:
        peft.load_with_config = real


def _fresh() -> Any:
    network.cache_clear()
    return network()


def adapters_target() -> Target:
    kinds = st.sampled_from(["attach", "start", "merge", "peft"])
    others = st.dictionaries(st.sampled_from([*MLX, *PEFT]), JSON, max_size=3)
    changed = st.builds(lambda base, other: json.dumps({**base, **other}).encode(), st.sampled_from([MLX, PEFT]), others)
    weights = st.booleans().map(lambda peft: (lambda header, data: packed(json.dumps(header).encode(), data))(*arrays_of(peft)))
    return Target(make_adapters, st.tuples(kinds, changed, weights), call_adapters, frozenset({"merged", "imported"}))
