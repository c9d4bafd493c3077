"""What all tests share: no network, one thread, a tiny model."""

import os

os.environ.update(
    HF_HUB_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    WANDB_MODE="offline",
    WANDB_SILENT="true",
    JSONARGPARSE_DEPRECATION_WARNINGS="off",  # lightning 2.6 calls what jsonargparse 4.53 has renamed
)

import helpers
import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory):
    """Folder of a tiny Llama with its tokenizer."""
    path = tmp_path_factory.mktemp("tiny") / "model"
    return helpers.tiny_model(path, helpers.tiny_tokenizer(path, chat_template=True))


@pytest.fixture(scope="session")
def tiny_preferences_file(tmp_path_factory):
    """A JSONL file of preferences."""
    return helpers.tiny_preferences(tmp_path_factory.mktemp("data") / "preferences.jsonl")


@pytest.fixture(scope="session")
def tiny_prompts_file(tmp_path_factory):
    """A JSONL file of prompts."""
    return helpers.tiny_prompts(tmp_path_factory.mktemp("data") / "prompts.jsonl")
