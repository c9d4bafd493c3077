"""What is counted while operations run: bytes by part, peaks, floating-point operations."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lit_vapo.plan.meter import Meter


@pytest.fixture
def meter():
    return Meter(nn.Linear(2, 2), vocabulary=50)


def test_what_is_made_counts_as_long_as_it_lives(meter):
    with FakeTensorMode(), meter:
        kept = torch.zeros(10, 100)  # 4,000 bytes
        torch.zeros(1000)  # 4,000 more, and gone
        assert meter.live["workspace"] == 4000
        assert meter.peak == 8000
        view = kept[:5]
        assert meter.live["workspace"] == 4000  # a view has no bytes of its own
        del kept
        assert meter.live["workspace"] == 4000
        del view
        assert meter.live["workspace"] == 0


def test_parts_are_those_of_the_peak(meter):
    with FakeTensorMode(), meter:
        with meter.part("activations"):
            kept = torch.zeros(100)
        torch.zeros(7, 50)  # its last axis is the vocabulary
        assert dict(meter.at_peak) == {"activations": 400, "logits": 1400}
        meter.start_over()
        assert meter.peak == 400
    del kept


def test_what_was_there_before_does_not_count(meter):
    with FakeTensorMode():
        before = torch.zeros(100)
        with meter:
            made = before + 1
            assert sum(meter.live.values()) == 400
    del made


def test_casts_of_weights_are_a_part_of_their_own():
    with FakeTensorMode():
        layer = nn.Linear(30, 40)
        meter = Meter(layer, vocabulary=1)
        x = torch.zeros(5, 30)
        with meter, torch.autocast("cpu", dtype=torch.bfloat16):
            layer(x)
            # Autocast keeps those of weights that are trained: (30·40 + 40)·2 bytes.
            assert meter.live["casts"] == 2480


def test_matrix_products_are_counted():
    with FakeTensorMode():
        layer = nn.Linear(30, 40, bias=False)
        with Meter(layer, vocabulary=1) as meter:
            layer(torch.zeros(5, 30)).sum().backward()
    # 2·5·30·40 forward; on the way back only the weight wants a gradient.
    assert meter.flops == 2 * 12000


def test_attention_counts_twice_two_products_and_five_on_the_way_back():
    with FakeTensorMode(), Meter(nn.Linear(1, 1), vocabulary=1) as meter:
        q, k, v = (torch.zeros(1, 2, 16, 8, requires_grad=True) for _ in range(3))
        out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        assert meter.flops == 4 * 2 * 16 * 16 * 8
        out.sum().backward()
    assert meter.flops == 3.5 * 4 * 2 * 16 * 16 * 8
