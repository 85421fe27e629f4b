"""Uploads, through a stand-in of huggingface_hub's client: what goes there, what stays here, and errors in one line."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalTokenNotFoundError

from mlxlora.adapters.hub import connect, push
from mlxlora.errors import InputError, RunError

FILES = {
    "adapters.safetensors": b"\x00weights",
    "adapter_config.json": b'{"model": "/home/me/models/tiny", "num_layers": 2}',
    "config.yaml": b"model: /home/me/models/tiny\ndata: ~/rows/secret.jsonl\niters: 20\nreward_file: /home/me/rewards.py\n",
    "metrics.jsonl": b'{"step": 20, "split": "valid", "loss": 1.0}\n',
    "samples.jsonl": b'{"prompt": "private"}\n',
    ".env": b"TOKEN=1",
    "notes.txt": b"mine",
    "checkpoints/0000020/state.safetensors": b"state",
}


class Hub:
    """Of huggingface_hub.HfApi, what is used here; keeps what it is given."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error, self.created, self.files = error, {}, {}

    def whoami(self) -> dict[str, str]:
        if self.error:
            raise self.error
        return {"name": "me"}

    def create_repo(self, **named: Any) -> str:
        self.created = named
        return f"https://huggingface.co/{named['repo_id']}"

    def upload_folder(self, *, repo_id: str, folder_path: str, commit_message: str) -> None:
        assert repo_id == self.created["repo_id"] and commit_message
        self.files = {str(p.relative_to(folder_path)): p.read_bytes() for p in Path(folder_path).rglob("*") if p.is_file()}


def folder(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def test_what_goes_there(tmp_path: Path) -> None:
    hub = Hub()
    assert push(folder(tmp_path, FILES), "me/adapters", api=hub) == "https://huggingface.co/me/adapters"
    assert hub.created == {"repo_id": "me/adapters", "private": True, "exist_ok": True}
    assert sorted(hub.files) == ["README.md", "adapter_config.json", "adapters.safetensors", "config.yaml", "metrics.jsonl"]
    everything = b"".join(hub.files.values())
    assert not [word for word in (b"/home", b"~/", b"private", b"TOKEN", str(tmp_path).encode()) if word in everything]
    assert b"model: tiny\ndata: secret.jsonl\niters: 20\n" in hub.files["config.yaml"]
    assert b"| loss | 1 |" in hub.files["README.md"]
    assert {path.name for path in tmp_path.iterdir()} == {name.split("/")[0] for name in FILES}
    assert (tmp_path / "config.yaml").read_bytes() == FILES["config.yaml"]


def test_other_folders(tmp_path: Path) -> None:
    hub = Hub()
    peft = {
        "adapter_model.safetensors": b"w",
        "adapter_config.json": b'{"base_model_name_or_path": "/home/me/x"}',
        "README.md": b"#",
    }
    push(folder(tmp_path / "peft", peft | {"notes.txt": b"mine"}), "me/peft", public=True, api=hub)
    assert hub.created["private"] is False and hub.files.keys() == peft.keys() and b"/home" not in hub.files["adapter_config.json"]
    model = {
        "config.json": b"{}",
        "model.safetensors": b"w",
        "tokenizer.json": b"{}",
        "chat_template.jinja": b"",
        "README.md": b"#",
    }
    push(folder(tmp_path / "model", model | {"logs/x": b"", "train.jsonl": b"{}"}), "me/model", api=hub)
    assert hub.files.keys() == model.keys()


def http_error(status: int) -> HfHubHTTPError:
    response: Any = SimpleNamespace(status_code=status, headers={}, request=None)
    return HfHubHTTPError(f"{status} Client Error\nmore", response=response)


ERRORS: dict[str, Any] = {
    "no token": (LocalTokenNotFoundError("Token is required"), InputError, "not logged in; run `hf auth login`"),
    "a bad token": (http_error(401), InputError, "run `hf auth login`"),
    "another's name": (http_error(403), InputError, "no write access"),
    "a broken hub": (http_error(500), RunError, "500 Client Error"),
    "no network": (ConnectionError("no route"), RunError, "cannot reach the hub (no route)"),
    "no connection": (HTTPError("refused"), RunError, "cannot reach the hub (refused)"),
}


@pytest.mark.parametrize(("error", "kind", "message"), ERRORS.values(), ids=ERRORS.keys())
def test_errors(error: Exception, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind) as raised:
        connect("me/adapters", Hub(error))
    assert str(raised.value).startswith("--push-to-hub me/adapters: ") and message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_nothing_to_upload(tmp_path: Path) -> None:
    hub = Hub()
    with pytest.raises(InputError, match=r"nothing to upload; expected one of adapters\.safetensors"):
        push(tmp_path, "me/adapters", api=hub)
    with pytest.raises(InputError, match="not a name such as org/name"):
        push(folder(tmp_path, FILES), "me/adapters/too", api=hub)
    assert not hub.created


def test_commands(mlxlora: Any, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub()
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: hub)
    done = mlxlora("push", folder(tmp_path / "run", FILES), "me/adapters", "--public")
    assert (done.code, done.out) == (0, "hub     https://huggingface.co/me/adapters\n") and hub.created["private"] is False
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: Hub(LocalTokenNotFoundError("x")))
    failed = mlxlora(
        "fuse", "--model", model_folder, "--save-path", tmp_path / "fused", "--adapter-path", "x", "--push-to-hub", "me/x"
    )
    assert failed.code == 2 and "hf auth login" in failed.err and not (tmp_path / "fused").exists()
