"""The sum of adapters: that of their updates, exactly, in one folder that mlx-lm loads."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm import load as load_with_mlx_lm

from mlxlora.adapters.files import read_adapter_config, save
from mlxlora.adapters.lora import adapters_of, update_of
from mlxlora.adapters.merge import merge
from mlxlora.adapters.prepare import attach, prepare
from mlxlora.config.options import AdapterOptions
from mlxlora.errors import InputError
from tests.support.tiny import dense, experts, shaken, tied

ONE = {"rank": 4, "scale": 3.0}
TWO = {"rank": 2, "scale": 0.7, "num_layers": 1, "lora_keys": ("q_proj", "down_proj")}
KINDS: dict[str, Any] = {
    "other ranks, scales and modules": (dense, ONE, TWO),
    "a rank of each module": (dense, ONE | {"rank_pattern": ("q_proj=6",)}, TWO),
    "components": (dense, ONE | {"init_lora_weights": "pissa"}, TWO),
    "experts": (experts, ONE, {"rank": 2, "scale": 0.5}),
    "an embedding that is the head": (tied, ONE | {"lora_keys": ("embed_tokens", "v_proj")}, ONE),
    "an embedding and a head": (dense, ONE | {"lora_keys": ("embed_tokens",)}, ONE | {"lora_keys": ("lm_head",)}),
}


def folder(path: Path, make: Any, seed: int, name: str = "base", **changes: Any) -> Path:
    """Adapters that a run might have left."""
    options = AdapterOptions(**{"num_layers": -1} | changes)
    mx.random.seed(seed)
    save(shaken(prepare(make(), options), 0.05), path, options, name)
    return path


def updates(model: Any) -> dict[str, mx.array]:
    return {path: update_of(module) for path, module in adapters_of(model).items()}


@pytest.mark.parametrize(("make", "one", "two"), KINDS.values(), ids=KINDS.keys())
def test_the_sum(make: Any, one: dict, two: dict, tmp_path: Path) -> None:
    folders = [folder(tmp_path / "one", make, 1, **one), folder(tmp_path / "two", make, 2, **two)]
    merge(folders, tmp_path / "sum", weights=[0.25, -2.0])
    parts = [updates(attach(make(), path)) for path in folders]
    found = updates(attach(make(), tmp_path / "sum"))
    for path, update in found.items():
        wanted = sum(w * part[path] for w, part in zip((0.25, -2.0), parts, strict=True) if path in part)
        assert mx.abs(update - wanted).max().item() < 1e-5, path
    assert found.keys() >= parts[0].keys() | parts[1].keys()
    assert read_adapter_config(tmp_path / "sum")["merged"] == {"one": 0.25, "two": -2.0}


@given(st.lists(st.floats(-2, 2), min_size=2, max_size=4))
@settings(deadline=None, max_examples=8)
def test_any_number(tmp_path_factory: pytest.TempPathFactory, weights: list[float]) -> None:
    root = tmp_path_factory.mktemp("merge")
    folders = [folder(root / str(i), dense, i, rank=i + 1, scale=1.0 + i) for i in range(len(weights))]
    assert merge(folders, root / "sum", weights=weights) == len(weights) * (len(weights) + 1) // 2
    found, parts = updates(attach(dense(), root / "sum")), [updates(attach(dense(), path)) for path in folders]
    assert all(
        mx.allclose(update, sum(w * part[path] for w, part in zip(weights, parts, strict=True)), atol=1e-5)
        for path, update in found.items()
    )


def test_the_command(mlxlora: Any, model_folder: Path, tmp_path: Path) -> None:
    def base() -> Any:
        return load_with_mlx_lm(str(model_folder))[0]

    one, two = (folder(tmp_path / name, base, i, str(model_folder), rank=4, scale=3.0) for i, name in enumerate(("one", "two")))
    done = mlxlora("merge", one, two, "--weights", "0.5,0.5", "--save-path", tmp_path / "sum")
    assert (done.code, done.out) == (0, f"merged  {tmp_path / 'sum'} (rank 8)\n"), done.err
    model, *_ = load_with_mlx_lm(str(model_folder), adapter_path=str(tmp_path / "sum"))
    assert mx.isfinite(model(mx.array([[5, 3, 9]]))).all().item()
    told = mlxlora("generate", "--adapter-path", tmp_path / "sum", "--prompt", "abc", "--max-tokens", 2)
    assert told.code == 0, told.err
    assert "replace it with --overwrite" in mlxlora("merge", one, two, "--save-path", tmp_path / "sum").err
    assert mlxlora("merge", one, two, "--save-path", tmp_path / "sum", "--overwrite").code == 0
    wrong = mlxlora("merge", one, two, "--weights", "a,b", "--save-path", tmp_path / "x")
    assert (wrong.code, wrong.err) == (2, "mlxlora: error: --weights must be numbers such as 0.5,0.5, got 'a,b'\n")


def test_mistakes(tmp_path: Path) -> None:
    one = folder(tmp_path / "one", dense, 1, **ONE)

    def refused(*others: Path, **named: Any) -> str:
        with pytest.raises(InputError, match=r"^[^\n]*$") as raised:
            merge([one, *others], tmp_path / "sum", **named)
        return str(raised.value)

    assert "two or more adapters and a weight for each, got 1 and 1 weights" in refused()
    assert "got 2 and 1 weights" in refused(one, weights=[1.0])
    assert "--weights must be finite numbers, got 1.0, nan" in refused(one, weights=[1.0, float("nan")])
    assert "DoRA's magnitudes cannot be added" in refused(folder(tmp_path / "dora", dense, 1, train_type="dora"))
    assert "these are whole weights" in refused(folder(tmp_path / "full", dense, 1, train_type="full"))
    assert "no adapters there" in refused(tmp_path / "nothing")
    other = folder(tmp_path / "other", dense, 1, "other", **ONE)
    assert f"they name several: {one} on base, {other} on other; if it is one model, use --model NAME" in refused(other)
    assert merge([one, other], tmp_path / "sum", model="base") == 8
    wide = folder(tmp_path / "wide", lambda: dense(intermediate_size=192), 1, **ONE)
    assert "merge adapters of one model" in refused(wide, overwrite=True)
