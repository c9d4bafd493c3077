"""The length sampler: all rows once, another order in every epoch, the same from the same seed, little padding."""

import itertools
import random

import pytest
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper

from lit_vapo.data.sampler import POOL, EpochSampler, LengthSampler

LENGTHS = [random.Random(i).randrange(5, 200) for i in range(1003)]


def test_seed_and_epoch_alone_decide():
    first, second = LengthSampler(LENGTHS, 8, seed=1), LengthSampler(LENGTHS, 8, seed=1)
    assert [list(first) for _ in range(3)] == [list(second) for _ in range(3)]
    assert list(LengthSampler(LENGTHS, 8, seed=1)) != list(LengthSampler(LENGTHS, 8, seed=2))
    # A resumed run is told its epoch, and goes on as if it had never stopped.
    resumed = LengthSampler(LENGTHS, 8, seed=1)
    resumed.set_epoch(3)
    assert list(resumed) == list(first)


def padded(order):
    return sum(8 * max(LENGTHS[row] for row in order[i : i + 8]) for i in range(0, 1000, 8))


def test_every_row_once_with_little_padding():
    sampler = LengthSampler(LENGTHS, 8)
    order = list(sampler)
    assert sorted(order) == list(range(1003))
    assert len(sampler) == 1003
    assert padded(order) < 1.1 * sum(LENGTHS)
    assert padded(range(1003)) > 1.5 * sum(LENGTHS)


def test_epochs_group_other_rows_together():
    sampler = LengthSampler(LENGTHS, 8)
    batches = [{frozenset(order[i : i + 8]) for i in range(0, 1000, 8)} for order in (list(sampler), list(sampler))]
    assert len(batches[0] & batches[1]) < 10


def test_batches_of_a_pool_hold_neighbours_in_length():
    # One pool: sorted and cut, so the batches' ranges of lengths do not overlap.
    lengths = LENGTHS[: 4 * POOL]
    order = list(LengthSampler(lengths, 4))
    ranges = sorted([min(v), max(v)] for v in ([lengths[r] for r in order[i : i + 4]] for i in range(0, 4 * POOL, 4)))
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(ranges))


def test_short_batches_stay_last():
    order = list(LengthSampler(LENGTHS, 8))
    assert len(order) % 8 == 3
    spread = [max(v) - min(v) for v in ([LENGTHS[r] for r in order[i : i + 8]] for i in range(0, 1000, 8))]
    assert max(spread) < 60


@pytest.mark.parametrize("lengths", [[], [3], [5, 1, 4]])
def test_fewer_rows_than_a_batch(lengths):
    assert sorted(LengthSampler(lengths, 8)) == list(range(len(lengths)))


def test_processes_share_a_batch_of_similar_lengths():
    # Lightning hands row i to process i mod 2: together they see the order of one process, batch by batch.
    lengths = LENGTHS[:400]
    whole = list(LengthSampler(lengths, 8, seed=5))
    shares = [
        list(DistributedSamplerWrapper(LengthSampler(lengths, 8, seed=5), num_replicas=2, rank=r, shuffle=False))
        for r in range(2)
    ]
    assert [row for both in zip(*shares, strict=True) for row in both] == whole


class Course:
    """A run that has come so far."""

    def __init__(self, taken, limit):
        self.batches = taken
        self.most = limit

    def taken(self):
        return self.batches

    def limit(self, batches):
        return min(batches, self.most)


def by_length(size, *args, **kwargs):
    return LengthSampler(LENGTHS[:size], *args, **kwargs)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize(("make", "size", "limit"), [(EpochSampler, 30, 99), (by_length, 30, 99), (by_length, 29, 3)])
def test_epoch_and_place_follow_from_the_batches_that_were_taken(make, size, limit, world):
    for rank in range(world):
        passes = make(size, 4 * world, 7, world, rank)
        served = []
        for _ in range(3):
            share = list(passes)
            served += [share[i : i + 4] for i in range(0, len(share), 4)][:limit]
        for taken in range(len(served)):
            order = list(make(size, 4 * world, 7, world, rank, Course(taken, limit)))
            per_epoch = min(limit, -(-size // (4 * world)))
            left = per_epoch - taken % per_epoch
            assert [order[i : i + 4] for i in range(0, len(order), 4)][:left] == served[taken : taken + left]


def test_an_incomplete_last_batch_that_is_left_out_is_no_batch_of_the_epoch():
    whole = EpochSampler(10, 4, drop_last=True)
    first, second = list(whole), list(whole)
    assert [list(EpochSampler(10, 4, course=Course(n, 99), drop_last=True)) for n in (1, 2)] == [first[4:], second]


def test_an_order_without_lengths_has_every_row_once_and_differs():
    sampler = EpochSampler(50, 8)
    orders = [list(sampler) for _ in range(3)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len({tuple(order) for order in orders}) == 3
