"""Small folders of models, and what is in a folder."""

import fnmatch
import json
import shutil
from pathlib import Path

import huggingface_hub
import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer

INDEX = "model.safetensors.index.json"
CONFIG = {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 96}
TEXTS = {
    "tokenizer.json": "{}",
    "tokenizer_config.json": '{"é": 1}',
    "merges.txt": "#version: 0.2\n",
    "generation_config.json": '{"eos_token_id": 3}\n',
    "chat_template.jinja": "{{ messages }}",
    "additional_chat_templates/tools.jinja": "{{ tools }}",
    "LICENSE": "free",
}


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def chat_model(model: str, folder: Path, *, turn: str, answer: str) -> tuple[Path, AutoTokenizer]:
    """A copy of a model's folder whose template writes every message as `turn`, and `answer` where
    one begins; and its tokenizer."""
    shutil.copytree(model, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = (
        f"{{% for m in messages %}}{turn}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{answer}{{% endif %}}"
    )
    tokenizer.save_pretrained(folder)
    return folder, tokenizer


def write_texts(folder: Path, texts: dict[str, str] = TEXTS) -> None:
    for name, text in texts.items():
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_text(text)


def same_tensors(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Bit for bit, dtypes and shapes too."""
    described = [{name: (t.dtype, t.shape) for name, t in each.items()} for each in (a, b)]
    bits = [{name: t.reshape(-1).view(torch.uint8) for name, t in each.items()} for each in (a, b)]
    return described[0] == described[1] and all(bits[0][n].equal(bits[1][n]) for n in a)


def plain_base(folder: Path, config: dict = CONFIG) -> Path:
    """A folder with a model's configuration and one small tensor in one file."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({"model.norm.weight": torch.ones(32)}, folder / "model.safetensors", {"format": "pt"})
    return folder


def on_the_hub(monkeypatch, cache: Path, repos: dict[str, Path]) -> list[list[str]]:
    """Folders that a hub would have, fetched as huggingface_hub lays them out: links into blobs.

    Returns:
        what is asked for, a list of patterns every time.
    """
    asked = []

    def snapshot_download(
        name: str, allow_patterns: list[str], revision: str = "abc", cache_dir: Path = cache, **_
    ) -> str:
        huggingface_hub.utils.validate_repo_id(name)
        asked.append(allow_patterns)
        repo = cache_dir / f"models--{name.replace('/', '--')}"
        snapshot, blobs = repo / "snapshots" / revision, repo / "blobs"
        snapshot.mkdir(parents=True, exist_ok=True)
        blobs.mkdir(exist_ok=True)
        for path in (path for path in repos[name].rglob("*") if path.is_file()):
            file = path.relative_to(repos[name])
            link = snapshot / file
            if any(fnmatch.fnmatch(str(file), p) for p in allow_patterns) and not link.exists():
                blob = blobs / f"{str(file).replace('/', '-')}-blob"
                blob.write_bytes(path.read_bytes())
                link.parent.mkdir(exist_ok=True)
                link.symlink_to(Path(*[".."] * (2 + str(file).count("/")), "blobs", blob.name))
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return asked
