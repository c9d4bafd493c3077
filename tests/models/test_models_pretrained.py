"""How models are held: the data type that `auto` takes."""

import pytest
import torch

from lit_vapo.models.pretrained import Pretrained, load_backbone, load_causal_lm
from lit_vapo.models.weightless import weightless


@pytest.fixture(scope="module")
def half_model(tmp_path_factory, tiny_model_dir):
    """Folder of a model that is stored in bfloat16."""
    folder = tmp_path_factory.mktemp("half")
    load_causal_lm(Pretrained(str(tiny_model_dir), dtype="bfloat16")).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def processor(monkeypatch):
    """Which instructions the processor has, and whether there is a GPU beside it."""

    def set_to(capability, gpu=False):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: gpu)

    return set_to


@pytest.mark.parametrize(
    ("capability", "gpu", "held"),
    [
        ("AVX2", False, torch.float32),
        ("DEFAULT", False, torch.float32),
        ("AVX512", False, torch.bfloat16),
        ("SVE256", False, torch.bfloat16),
        ("AVX2", True, torch.bfloat16),
    ],
)
def test_auto_is_as_stored_where_half_precision_is_fast(half_model, processor, capability, gpu, held):
    processor(capability, gpu)
    assert load_causal_lm(Pretrained(half_model)).dtype == held
    assert load_backbone(Pretrained(half_model), 1).dtype == held


def test_what_the_user_names_stays(half_model, processor):
    processor("AVX2")
    assert load_causal_lm(Pretrained(half_model, dtype="bfloat16")).dtype == torch.bfloat16


def test_a_plan_is_for_a_gpu(half_model, processor):
    processor("AVX2")
    with weightless():
        assert load_causal_lm(Pretrained(half_model)).dtype == torch.bfloat16
