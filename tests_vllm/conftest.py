"""Models and heads on disk, once a run."""

import os
from pathlib import Path

import pytest
import torch

from tests_vllm import models

os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory):
    """The folder of a family's model."""
    made: dict[str, Path] = {}

    def find(family: str) -> Path:
        if family not in made:
            made[family] = models.save_model(tmp_path_factory.mktemp(family) / "model", family)
        return made[family]

    return find


@pytest.fixture(scope="session")
def llama(folder_of) -> Path:
    return folder_of("llama")


@pytest.fixture(scope="session")
def head_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("head") / "head"
    models.head().save_pretrained(folder)
    return folder
