"""Every statistic a PPO iteration logs, against plain loops over rows and tokens."""

import math
import statistics
import time

import ppo_helpers
import pytest
import torch
from ppo_helpers import fit_ppo, ppo_module, prompt_data

import lit_vapo.stages.ppo.module as ppo
from lit_vapo.models.generation import Sampling
from lit_vapo.models.trunk import length_mask
from lit_vapo.objectives.variance_aware import VarianceAware
from lit_vapo.rewards.reward_model import RewardModel
from lit_vapo.stages.ppo.update import PPOUpdate, UpdateSettings
from lit_vapo.types import TextReward

BETA, TEMPERATURE, CLIP, PENALTY, EPS = 0.2, 0.8, 0.5, 0.3, 0.05
SETTINGS = UpdateSettings(2, 2, micro_batch_tokens=40, clip_range=EPS, value_clip_range=EPS, entropy_coef=0.01)
SPEED = {f"train/{phase}tokens_per_second" for phase in ("", "generate_", "score_", "update_")}


class Length(TextReward):
    def __call__(self, prompts, responses):
        return torch.tensor([float(len(r)) for r in responses])


def mean(values):
    return sum(values) / len(values)


def variance(values):
    return mean([(x - mean(values)) ** 2 for x in values])


@torch.no_grad()
def distributions(nets, rows, role):
    """Log-probabilities of the whole vocabulary at every position, as the bare model of transformers gives them."""
    mask = length_mask(rows.lengths, rows.input_ids.shape[1]).long()
    with nets.policy.acting_as(role) as lm:
        return (lm(input_ids=rows.input_ids, attention_mask=mask).logits.double() / TEMPERATURE).log_softmax(-1)


def loop_rollout(nets, made, own):
    """What is known about each response, as lists of rows and tokens, from ids and models alone."""
    policy, reference = (distributions(nets, made.rows, role) for role in ("actor", "reference"))
    rows = []
    for i, start in enumerate(made.rows.prompt_lengths.tolist()):
        end = int(made.rows.lengths[i])
        ids = made.rows.input_ids[i].tolist()
        at = range(start, end)
        members = own(torch.tensor([ids[:end]]), torch.tensor([end]), torch.tensor([start])).members[0].tolist()
        spread = sum((m - mean(members)) ** 2 for m in members) / (len(members) - 1)
        stopped = ids[end - 1] < 60
        score = max(-CLIP, min(CLIP, mean(members))) - (0 if stopped else PENALTY)
        rows.append({
            "logprobs": [float(policy[i, t - 1, ids[t]]) for t in at],
            "ref_logprobs": [float(reference[i, t - 1, ids[t]]) for t in at],
            "entropy": [-float((policy[i, t - 1].exp() * policy[i, t - 1]).sum()) for t in at],
            "values": made.values[i, : end - start].tolist(),
            "members": members, "variance": spread, "stopped": stopped, "score": score,
            "weight": max(0.1, min(10.0, spread / float(made.reference_variance))),
            "gold": float(len(made.responses[i])),
        })  # fmt: skip
    return rows


def loop_advantages(rows):
    """GAE of each row's rewards backwards in time; whitened over all tokens."""
    shared = mean([row["weight"] for row in rows])
    for row in rows:
        ratio = [a - b for a, b in zip(row["logprobs"], row["ref_logprobs"], strict=True)]
        rewards = [-BETA * shared * x for x in ratio]
        rewards[-1] += row["score"] - BETA * (row["weight"] - shared) * sum(ratio)
        advantage, following, row["advantages"] = 0.0, 0.0, []
        for reward, value in reversed(list(zip(rewards, row["values"], strict=True))):
            advantage = reward + following - value + 0.95 * advantage
            following = value
            row["advantages"].insert(0, advantage)
        row["returns"] = [a + v for a, v in zip(row["advantages"], row["values"], strict=True)]
    tokens = [a for row in rows for a in row["advantages"]]
    std = math.sqrt(variance(tokens) * len(tokens) / (len(tokens) - 1))
    for row in rows:
        row["advantages"] = [(a - mean(tokens)) / std for a in row["advantages"]]


def rollout_values(rows):
    """Statistics of a rollout."""
    ratios = [sum(row["logprobs"]) - sum(row["ref_logprobs"]) for row in rows]
    k3 = [math.exp(-x) - 1 + x for x in ratios]
    means = [mean(row["members"]) for row in rows]
    weights = [row["weight"] for row in rows]
    return {
        "reward_mean": mean(means),
        "reward_std": math.sqrt(variance(means)),
        **{f"reward_member_{k}": mean([row["members"][k] for row in rows]) for k in range(3)},
        "objective_reward": mean([row["score"] for row in rows]),
        "ensemble_sigma": mean([math.sqrt(row["variance"]) for row in rows]),
        "gold": mean([row["gold"] for row in rows]),
        "gold_std": statistics.pstdev(row["gold"] for row in rows),
        "kl_k1": mean(ratios),
        "kl_k3": mean(k3),
        "kl_weighted_k3": mean([w * x for w, x in zip(weights, k3, strict=True)]),
        "kl_weight_mean": mean(weights),
        "kl_weight_max": max(weights),
        "kl_coef": BETA,
        "effective_kl_coef": BETA * mean(weights),
        "entropy": mean([x for row in rows for x in row["entropy"]]),
        "response_length": mean([len(row["logprobs"]) for row in rows]),
        "response_length_std": statistics.pstdev(len(row["logprobs"]) for row in rows),
        "eos_rate": mean([float(row["stopped"]) for row in rows]),
        "value_mean": mean([x for row in rows for x in row["values"]]),
        "return_mean": mean([x for row in rows for x in row["returns"]]),
        "explained_variance": 1
        - variance([g - v for row in rows for g, v in zip(row["returns"], row["values"], strict=True)])
        / variance([g for row in rows for g in row["returns"]]),
    }


def minibatch_values(rows, passes):
    """Statistics of one minibatch: `passes` are (row number, new log-probabilities, new values)."""
    names = ("policy_loss", "value_loss", "ratio", "clip_fraction", "value_clip_fraction", "approx_kl")
    seen = {name: [] for name in names}
    for number, logprobs, values in passes:
        row = rows[number]
        for t, old in enumerate(row["logprobs"]):
            ratio, advantage, target = math.exp(logprobs[t] - old), row["advantages"][t], row["returns"][t]
            free, clipped = -advantage * ratio, -advantage * max(1 - EPS, min(1 + EPS, ratio))
            near = row["values"][t] + max(-EPS, min(EPS, values[t] - row["values"][t]))
            errors = (values[t] - target) ** 2 / 2, (near - target) ** 2 / 2
            seen["policy_loss"].append(max(free, clipped))
            seen["value_loss"].append(max(errors))
            seen["ratio"].append(ratio)
            seen["clip_fraction"].append(float(clipped > free))
            seen["value_clip_fraction"].append(float(errors[1] > errors[0]))
            seen["approx_kl"].append(ratio - 1 - (logprobs[t] - old))
    out = {name: mean(values) for name, values in seen.items()}
    return {**out, "ratio_max": max(seen["ratio"])}


def flat_gradient(nets):
    """The actor's gradient as it stands, as numbers."""
    parameters = nets.actor_parameters()
    return [x for p in parameters for x in (torch.zeros_like(p) if p.grad is None else p.grad).flatten().tolist()]


def signal_values(seen):
    """Cosine of the gradients of halves, every other row of the first minibatch, and the share that is signal."""
    rows = sorted(number for number, *_ in seen["minibatches"][0])
    (first,) = [gradient for done, gradient in seen["gradients"] if done == set(rows[::2])]
    whole = seen["gradients"][-1][1]
    second = [a - b for a, b in zip(whole, first, strict=True)]
    one, two, both = (math.sqrt(sum(x * x for x in g)) for g in (first, second, whole))
    dot, share = sum(a * b for a, b in zip(first, second, strict=True)), len(rows[::2]) / len(rows)
    cosine = dot / (one * two)
    return {"actor_grad_cosine": cosine, "actor_grad_signal": dot / (share * (1 - share) * both * both)}


class Watch:
    """Records what an iteration works with: the rollout, every pass of its update, every gradient, its time."""

    def __init__(self, module, monkeypatch, own):
        self.iterations = []
        make, accumulate, loss, step = ppo.RolloutMaker.make, PPOUpdate._accumulate, PPOUpdate._loss, PPOUpdate._step
        train = module.training_step

        def watched_train(batch, batch_idx):
            started = time.perf_counter()
            train(batch, batch_idx)
            self.iterations[-1]["wall"] = time.perf_counter() - started

        def watched_make(maker, *args, **kwargs):
            made = make(maker, *args, **kwargs)
            made.reference_variance = module.reward.head.reference_variance
            rows = loop_rollout(maker.networks, made, own)
            loop_advantages(rows)
            self.iterations.append({"made": made, "rows": rows, "minibatches": [], "norms": [], "gradients": []})
            return made

        def watched_accumulate(updater, *args):
            self.iterations[-1]["minibatches"].append([])
            return accumulate(updater, *args)

        def watched_loss(updater, part, train_actor):
            nets, known = updater.networks, self.iterations[-1]
            if len(known["minibatches"]) == 1:
                done = {number for number, *_ in known["minibatches"][0]}
                known["gradients"].append((done, flat_gradient(nets)))
            with torch.no_grad():
                logprobs = nets.actor(part.rows, updater.shaping).logprobs
                values = nets.values(part.rows, part.value_states)
            texts = [
                row[:n].tolist()
                for row, n in zip(known["made"].rows.input_ids, known["made"].rows.lengths, strict=True)
            ]
            for i, length in enumerate(part.rows.lengths.tolist()):
                number = texts.index(part.rows.input_ids[i, :length].tolist())
                known["minibatches"][-1].append((number, logprobs[i].tolist(), values[i].tolist()))
            return loss(updater, part, train_actor)

        def watched_step(updater, *args):
            if not self.iterations[-1]["norms"]:
                self.iterations[-1]["gradients"].append((None, flat_gradient(updater.networks)))
            groups = updater.networks.actor_parameters(), updater.networks.critic_parameters()
            norms = [math.sqrt(sum(float(x) ** 2 for p in group for x in p.grad.flatten())) for group in groups]
            self.iterations[-1]["norms"].append(norms)
            return step(updater, *args)

        module.training_step = watched_train
        monkeypatch.setattr(ppo.RolloutMaker, "make", watched_make)
        for name, method in (("_accumulate", watched_accumulate), ("_loss", watched_loss), ("_step", watched_step)):
            monkeypatch.setattr(PPOUpdate, name, method)


@pytest.fixture(scope="module")
def run(tiny_model_dir, tmp_path_factory):
    """Two iterations, in the second of which the policy is no longer its reference; logged rows and what was seen."""
    folder = tmp_path_factory.mktemp("statistics")
    reward = ppo_helpers.ensemble(folder / "ensemble", tiny_model_dir)
    options = {"kl_coef": BETA, "reward_clip": CLIP, "missing_eos_penalty": PENALTY, "gold": Length()}
    sampling = Sampling(6, TEMPERATURE, list(range(60)))
    module = ppo_module(
        tiny_model_dir, reward, objective=VarianceAware(), sampling=sampling, update=SETTINGS, **options
    )
    with pytest.MonkeyPatch.context() as monkeypatch:
        watch = Watch(module, monkeypatch, RewardModel.from_pretrained(reward))
        data = prompt_data(tiny_model_dir, folder, batch_size=6)
        rows = fit_ppo(module, data, folder, limit_train_batches=2)
    return rows, watch.iterations


def expected_values(number, seen):
    parts = [minibatch_values(seen["rows"], passes) for passes in seen["minibatches"]]
    return {
        **rollout_values(seen["rows"]),
        **{name: mean([part[name] for part in parts]) for name in parts[0]},
        "ratio_max": max(part["ratio_max"] for part in parts),
        **signal_values(seen),
        "first_ratio": parts[0]["ratio"],
        "first_ratio_max": parts[0]["ratio_max"],
        "actor_grad_norm": mean([norms[0] for norms in seen["norms"]]),
        "critic_grad_norm": mean([norms[1] for norms in seen["norms"]]),
        "updates": len(seen["norms"]),
        "iteration": number,
    }


@pytest.mark.parametrize("number", [1, 2])
def test_statistics_are_those_of_plain_loops(run, number):
    logged, seen = run[0][number - 1], run[1][number - 1]
    expected = {f"train/{name}": value for name, value in expected_values(number, seen).items()}
    assert set(expected) == {name for name in logged if name.startswith("train/")} - SPEED
    for name, value in expected.items():
        assert logged[name] == pytest.approx(value, rel=2e-4, abs=2e-6), name


def test_the_run_has_what_the_statistics_are_about(run):
    # Otherwise a wrong mask or a forgotten clip would go unseen.
    first, second = run[0]
    for seen in run[1]:
        assert len({len(row["logprobs"]) for row in seen["rows"]}) > 1
        assert len(seen["minibatches"]) == 4
    assert {row["stopped"] for seen in run[1] for row in seen["rows"]} == {True, False}
    assert first["train/first_ratio"] == pytest.approx(1, abs=1e-5)
    assert first["train/ratio_max"] > 1 + EPS
    assert 0 < first["train/clip_fraction"] < 1
    assert 0 < first["train/value_clip_fraction"] < 1
    assert second["train/kl_k3"] > 1e-3
    assert abs(second["train/kl_k1"] - second["train/kl_k3"]) > 1e-4


@pytest.mark.parametrize("number", [1, 2])
def test_speeds_are_tokens_over_the_time_of_their_phase(run, number):
    logged, seen = run[0][number - 1], run[1][number - 1]
    tokens = sum(len(row["logprobs"]) for row in seen["rows"])
    seconds = seen["made"].seconds
    assert set(seconds) == {"generate", "score", "update"}
    for phase, spent in seconds.items():
        assert logged[f"train/{phase}_tokens_per_second"] == pytest.approx(tokens / spent, rel=1e-5)
    assert sum(seconds.values()) <= tokens / logged["train/tokens_per_second"] * 1.0001 <= seen["wall"] * 1.001
