"""Every source of rewards passes this suite; a new file under lit_vapo/rewards/ is found unasked.

`ENTRIES` says how each class is made. For a new class add at least one entry, and a keyword where it promises less.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import ppo_helpers
import public_helpers
import pytest
import torch
from helpers import concrete_subclasses
from services import says, service

import lit_vapo.rewards
from lit_vapo.models.pretrained import Pretrained, decoder_layers, freeze, load_backbone
from lit_vapo.models.settings import construct
from lit_vapo.objectives.variance_aware import VarianceAware
from lit_vapo.objectives.worst_case import WorstCase
from lit_vapo.rewards import (
    EnsembleReward,
    FunctionReward,
    HeldEnsemble,
    PretrainedRewards,
    RemoteReward,
    Responses,
    RewardSource,
    WeightedSum,
)
from lit_vapo.rewards.members.lora import LoraEnsemble
from lit_vapo.rewards.reward_model import FeatureSpec, RewardModel
from lit_vapo.stages.settings import plain

SOURCES = concrete_subclasses(lit_vapo.rewards, RewardSource)
COUNT = len(ppo_helpers.PROMPTS)


@dataclass
class World:
    """What sources may be made of.

    Attributes:
        model: Folder of the tiny policy's base, with a chat template.
        ensemble: Folder of a calibrated ensemble of 3 heads on it.
        fresh: Folder of one that is not calibrated.
        public: Folders of two public reward models with one label, and of one with three.
        urls: A service for each number of members.
        folder: For whatever else an entry writes.
    """

    model: str
    ensemble: str
    fresh: str
    public: list[str]
    urls: dict[int, str]
    folder: Path


@dataclass
class Entry:
    """How a source is made, and what it promises.

    Attributes:
        make: Makes one, not prepared.
        centred: Its mean is 0 over the responses it is calibrated on.
        settings: A checkpoint can name it.
    """

    make: Callable[[World], RewardSource]
    centred: bool = False
    settings: bool = True


def adapters(world, name):
    """Folder of two members as adapters of the policy's base, which they hang into it."""
    folder = world.folder / name
    if not folder.exists():
        base = Pretrained(world.model)
        head = LoraEnsemble(2, rank=4, seed=len(name))
        head.build(32)
        backbone = freeze(load_backbone(base))
        backbone = head.attach(backbone, decoder_layers(backbone))
        for i, parameter in enumerate(p for n, p in head.named_parameters() if "lora_b" in n):
            parameter.data.normal_(0, 0.3, generator=torch.Generator().manual_seed(i))
        RewardModel(FeatureSpec(base), head, backbone).save_pretrained(folder)
    return str(folder)


def total(world, **kwargs):
    return WeightedSum({"ensemble": world.fresh, "length": FunctionReward("reward_functions:length")}, **kwargs)


def public(folders, **kwargs):
    return PretrainedRewards([Pretrained(folder) for folder in folders], **kwargs)


def served(number, body):
    """Rewards of texts, as a service gives them: by the length, and by how often a letter is in them."""
    texts = [row["response"] for row in body["rows"]]
    return says(body={"rewards": [len(text) / 7 for text in texts]})


def three(number, body):
    """The same from three members."""
    texts = [row["response"] for row in body["rows"]]
    return says(body={"rewards": [[len(t) / 7, len(t.encode()) / 5, len(set(t)) / 3] for t in texts]})


ENTRIES: dict[type[RewardSource], dict[str, Entry]] = {
    EnsembleReward: {
        "calibrated": Entry(lambda world: EnsembleReward(world.ensemble)),
        "fresh": Entry(lambda world: EnsembleReward(world.fresh), centred=True),
        "adapters": Entry(lambda world: EnsembleReward(adapters(world, "one")), centred=True),
    },
    HeldEnsemble: {
        "calibrated": Entry(
            lambda world: HeldEnsemble(RewardModel.from_pretrained(world.ensemble, with_backbone=False)),
            settings=False,
        ),
    },
    PretrainedRewards: {
        "two": Entry(lambda world: public(world.public[:2]), centred=True),
        "two, read anew": Entry(lambda world: public(world.public[:2], resident=False), centred=True),
        "three labels": Entry(lambda world: public(world.public[2:]), centred=True),
        "one": Entry(lambda world: public(world.public[:1]), centred=True),
    },
    RemoteReward: {
        "one number": Entry(lambda world: RemoteReward(world.urls[1])),
        "three": Entry(lambda world: RemoteReward(world.urls[3], 3)),
        "three, normalised": Entry(lambda world: RemoteReward(world.urls[3], 3, True), centred=True),
    },
    FunctionReward: {
        "one number": Entry(lambda world: FunctionReward("reward_functions:length")),
        "one, normalised": Entry(lambda world: FunctionReward("reward_functions:length", 1, True), centred=True),
        "two members": Entry(lambda world: FunctionReward("reward_functions:sizes", 2), centred=True),
        "two as they are": Entry(lambda world: FunctionReward("reward_functions:sizes", 2, False)),
    },
    WeightedSum: {
        "ensemble and function": Entry(lambda world: total(world, weights={"length": -0.5})),
        "independent": Entry(
            lambda world: WeightedSum({"ensemble": world.fresh, "vowels": FunctionReward("reward_functions:sizes", 2)}),
            centred=True,
        ),
        "aligned": Entry(
            lambda world: WeightedSum({"one": world.fresh, "other": world.ensemble}, {"other": 0.5}, aligned=True),
        ),
        "two ensembles in the policy's base": Entry(
            lambda world: WeightedSum({x: adapters(world, x) for x in ("one", "other")}, {"one": 2.0}), centred=True
        ),
        "functions": Entry(
            lambda world: WeightedSum(
                {x: FunctionReward(f"reward_functions:{x}") for x in ("length", "waited")}, {"length": 2.0}
            )
        ),
    },
}
CASES = [
    pytest.param(entry, id=f"{kind.__name__}: {name}")
    for kind, named in ENTRIES.items()
    for name, entry in named.items()
]


@pytest.fixture(scope="module")
def world(tiny_model_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    ensemble = ppo_helpers.ensemble(folder / "ensemble", tiny_model_dir)
    fresh = ppo_helpers.ensemble(folder / "fresh", tiny_model_dir, calibrated=False)
    labels = {"a": 1, "b": 1, "c": 3}
    made = [public_helpers.classifier(folder / n, count, seed=k) for k, (n, count) in enumerate(labels.items())]
    with service(served) as one, service(three) as many:
        yield World(tiny_model_dir, ensemble, fresh, made, {1: one.url, 3: many.url}, folder)


def ready(source, world):
    """The source as a run has it before it is calibrated, and a maker of responses for it."""
    nets = ppo_helpers.networks(world.model, world.ensemble)
    source.check()
    source.prepare(nets.policy)
    nets.__dict__["scorer"] = source
    return ppo_helpers.maker(nets, world.model)


def drawn(maker, world, seed=0):
    """Responses of the reference."""
    torch.manual_seed(seed)
    (responses,) = maker.references([ppo_helpers.prompt_batch(world.model)])
    return responses


def calibrated(entry, world):
    """A source that is ready to score, and responses; it was calibrated on others if it was not."""
    source = entry.make(world)
    maker = ready(source, world)
    if not source.calibrated:
        source.calibrate([drawn(maker, world, seed) for seed in (1, 2)])
    assert source.calibrated
    return source, drawn(maker, world)


def select(responses: Responses, rows: list[int]) -> Responses:
    """Some of the responses."""
    index = torch.tensor(rows)

    def encode(tokenizer, path, **options):
        every = responses.encode(tokenizer, path, **options)
        return [every[i] for i in rows]

    return replace(
        responses,
        prompts=[responses.prompts[i] for i in rows],
        texts=[responses.texts[i] for i in rows],
        finished=responses.finished[index],
        rows=responses.rows.select(index),
        encode=encode,
        columns={name: [column[i] for i in rows] for name, column in responses.columns.items()},
        pooled={tap: x[index] for tap, x in responses.pooled.items()},
    )


def numbers(estimate):
    """What an estimate says of each response."""
    return [x for x in (estimate.mean, estimate.variance, estimate.members) if x is not None]


def test_every_source_has_an_entry():
    missing = [kind.__name__ for kind in SOURCES if not ENTRIES.get(kind)]
    assert not missing, f"say in ENTRIES of {Path(__file__).name} how to make {', '.join(missing)}"


@pytest.mark.parametrize("entry", CASES)
def test_the_estimate_has_the_shapes_it_should(entry, world):
    source, responses = calibrated(entry, world)
    estimate = source.score(responses)
    for x in (estimate.mean, estimate.variance):
        assert (x.shape, x.dtype) == ((COUNT,), torch.float32)
    assert all(torch.isfinite(x).all() for x in numbers(estimate))
    assert (estimate.variance >= -1e-6).all()
    assert (estimate.variance.max() > 0) == (source.num_members > 1)
    assert estimate.mean.std() > 0
    assert estimate.members is not None or not source.separate_members
    if estimate.members is not None:
        assert estimate.members.shape == (COUNT, source.num_members)
    if source.num_members > 1:
        # VarianceAware divides by it.
        assert estimate.reference_variance.shape == ()
        assert estimate.reference_variance > 0


@pytest.mark.parametrize("entry", CASES)
def test_rows_may_be_permuted(entry, world):
    source, responses = calibrated(entry, world)
    order = [4, 2, 0, 5, 1, 3]
    for x, y in zip(numbers(source.score(responses)), numbers(source.score(select(responses, order))), strict=True):
        torch.testing.assert_close(x[order], y, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("entry", CASES)
def test_a_batch_is_scored_as_its_parts_are(entry, world):
    source, responses = calibrated(entry, world)
    whole = numbers(source.score(responses))
    parts = [numbers(source.score(select(responses, rows))) for rows in ([0], [1, 2], [3, 4, 5])]
    for x, y in zip(whole, map(torch.cat, zip(*parts, strict=True)), strict=True):
        torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("entry", CASES)
def test_scoring_changes_nothing(entry, world):
    source, responses = calibrated(entry, world)
    before, drawn_before = {k: v.clone() for k, v in source.state_dict().items()}, torch.get_rng_state()
    first, again = numbers(source.score(responses)), numbers(source.score(responses))
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
    assert all(torch.equal(value, before[name]) for name, value in source.state_dict().items())
    assert torch.equal(torch.get_rng_state(), drawn_before)


@pytest.mark.parametrize("entry", CASES)
def test_calibration_sets_origin_and_unit(entry, world):
    source = entry.make(world)
    maker = ready(source, world)
    if source.calibrated:
        assert not entry.centred
        return
    references = [drawn(maker, world, seed) for seed in (1, 2)]
    # Iterated once, as in a run.
    source.calibrate(iter(references))
    estimates = [source.score(responses) for responses in references]
    mean, variance = (torch.cat([getattr(e, name) for e in estimates]) for name in ("mean", "variance"))
    if entry.centred:
        torch.testing.assert_close(mean.mean(), torch.tensor(0.0), atol=1e-5, rtol=0)
    if source.num_members > 1:
        torch.testing.assert_close(variance.mean(), estimates[0].reference_variance, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("entry", CASES)
def test_a_checkpoint_brings_it_back(entry, world):
    source, responses = calibrated(entry, world)
    again = entry.make(world)
    if entry.settings:
        written = json.loads(json.dumps(plain(source)))
        assert written["class_path"] == f"{type(source).__module__}.{type(source).__name__}"
        again = construct(type(source), written["init_args"])
        assert plain(again) == written
    kept = {name: source.state_dict()[name] for name in source.own_state()}
    ready(again, world)
    assert again.own_state() == kept.keys()
    assert not again.load_state_dict(kept, strict=False).unexpected_keys
    assert again.calibrated
    one, two = source.score(responses), again.score(responses)
    assert all(torch.equal(x, y) for x, y in zip(numbers(one), numbers(two), strict=True))
    assert one.reference_variance == two.reference_variance


@pytest.mark.parametrize("entry", CASES)
def test_it_may_stand_in_a_sum(entry, world):
    source, responses = calibrated(entry, world)
    own = source.score(responses)
    together = WeightedSum({"own": source, "text": FunctionReward("reward_functions:length")}, {"text": 2.0})
    together.check()
    together.prepare(None)
    assert together.calibrated
    estimate = together.score(responses)
    length = torch.tensor([0.1 * len(text) for text in responses.texts])
    torch.testing.assert_close(estimate.mean, own.mean + 2 * length)
    torch.testing.assert_close(estimate.variance, own.variance)
    assert torch.equal(estimate.parts["own"].mean, own.mean)
    assert (together.num_members, together.separate_members) == (source.num_members, source.separate_members)


@pytest.mark.parametrize("entry", CASES)
def test_objectives_refuse_what_they_cannot_use(entry, world):
    source = entry.make(world)
    for objective, fits in (
        (VarianceAware(), source.num_members > 1),
        (WorstCase(), source.separate_members),
    ):
        if fits:
            objective.check_members(source.num_members, source.separate_members)
        else:
            with pytest.raises(ValueError, match="expected at least 2 members|separate members"):
                objective.check_members(source.num_members, source.separate_members)


@pytest.mark.parametrize("entry", CASES)
def test_a_critic_starts_only_from_what_it_reads_too(entry, world):
    source, _ = calibrated(entry, world)
    assert source.linear_mean() is None or source.reads() is not None


@pytest.mark.parametrize("entry", CASES)
def test_it_costs_nothing_before_it_is_prepared(entry, world):
    source = entry.make(world)
    assert not entry.settings or not source.state_dict()


def test_two_ensembles_in_one_base_do_not_disturb_each_other(world):
    def scored(source):
        maker = ready(source, world)
        source.calibrate([drawn(maker, world, seed) for seed in (1, 2)])
        return source.score(drawn(maker, world))

    names = ("one", "other")
    together = scored(WeightedSum({name: adapters(world, name) for name in names})).parts
    for name in names:
        alone = scored(EnsembleReward(adapters(world, name)))
        torch.testing.assert_close(together[name].members, alone.members, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(together["one"].members, together["other"].members, atol=0.1)
