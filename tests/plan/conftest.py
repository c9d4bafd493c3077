"""A model of which there is nothing but its configuration."""

import pytest
from plan_helpers import config_only


@pytest.fixture(scope="session")
def bare_model(tmp_path_factory):
    """A Llama of five blocks, as its config.json says; there are no weights."""
    return config_only(tmp_path_factory.mktemp("bare") / "model")
