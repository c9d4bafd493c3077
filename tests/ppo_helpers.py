"""Tiny ensembles, modules and trainers for the tests of rollouts and PPO."""

from types import SimpleNamespace

import helpers
import torch
from lightning.pytorch import Callback, Trainer

from lit_vapo.advantages.gae import Gae
from lit_vapo.data.collate import PromptBatch, pad
from lit_vapo.data.datamodule import PromptDataModule
from lit_vapo.models.actor_critic import ActorCritic
from lit_vapo.models.critic import CriticSpec
from lit_vapo.models.generation import Sampling
from lit_vapo.models.pretrained import (
    Lora,
    Pretrained,
    decoder_layers,
    freeze,
    hidden_size,
    load_backbone,
    load_tokenizer,
)
from lit_vapo.objectives.mean_reward import MeanReward
from lit_vapo.rewards import load_reward
from lit_vapo.rewards.members.heads import HeadEnsemble
from lit_vapo.rewards.members.lora import LoraEnsemble
from lit_vapo.rewards.reward_model import FeatureSpec, RewardModel
from lit_vapo.rollout import RolloutMaker
from lit_vapo.stages.ppo.experience import compute_advantages
from lit_vapo.stages.ppo.module import PPOModule
from lit_vapo.stages.ppo.update import UpdateSettings

PROMPTS = ["the film", "the plot was good and", "Review", "a quiet family was", "slow", "the story was"]


def ensemble(folder, model, members=3, layer=None, pooling="last", calibrated=True, ends=()):
    """A random head ensemble on the tiny model, saved into `folder`."""
    head = HeadEnsemble(members, moderated=False)  # so that tests may take variances of members
    head.build(32)
    if calibrated:
        head.calibrate(torch.randn(64, 32, generator=torch.Generator().manual_seed(1)))
    RewardModel(FeatureSpec(Pretrained(model), layer, pooling, list(ends)), head, None).save_pretrained(folder)
    return str(folder)


def saved_ensemble(folder, model, quantization=None, layer=None, **kwargs):
    """Two members with adapters of some size on the tiny model, saved into `folder`."""
    spec = FeatureSpec(Pretrained(model, quantization=quantization), layer)
    head = LoraEnsemble(2, rank=4, **kwargs)
    head.build(hidden_size(spec.base))
    backbone = freeze(load_backbone(spec.base, layer))
    backbone = head.attach(backbone, decoder_layers(backbone))
    for i, b in enumerate(head.lora_b.values()):
        b.data.normal_(0, 0.3, generator=torch.Generator().manual_seed(i))
    head.calibrated.fill_(True)
    RewardModel(spec, head, backbone).save_pretrained(folder)
    return str(folder)


def networks(model, reward, lora=True, critic="reference", **kwargs):
    """The networks of PPO on a tiny model, with reproducible adapters; `scorer` is what scores."""
    torch.manual_seed(0)
    spec = None if critic is None else CriticSpec(critic, **kwargs)
    return with_reward(Pretrained(model), Lora(4, 16.0) if lora else None, spec, reward)


def with_reward(base, lora, critic, reward, policy=None):
    """The networks of PPO as its module makes them, and beside them what scores."""
    source = load_reward(str(reward))
    nets = ActorCritic(base, lora, critic, policy, source.reads())
    source.prepare(nets.policy)
    nets.warm_start_critic(source.linear_mean())
    # Beside them and no part of them.
    nets.__dict__["scorer"] = source
    return nets


def moved_networks(model, reward):
    """The same with a policy that differs from its reference."""
    found = networks(model, reward)
    for name, parameter in found.policy.lm.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(1))
    return found


def prompt_batch(model, prompts=None):
    """Left-padded prompts."""
    prompts = prompts or PROMPTS
    tokenizer = load_tokenizer(Pretrained(model))
    ids, lengths = pad([tokenizer(p)["input_ids"] for p in prompts], left=True)
    return PromptBatch(ids, lengths, list(prompts), torch.arange(len(prompts)))


def maker(nets, model, tokens=6, temperature=1.0, num_responses=1, **kwargs):
    """A rollout maker for `nets` or a module, with so many stop tokens that responses differ in length."""
    nets, scorer = (nets.networks, nets.reward) if isinstance(nets, PPOModule) else (nets, nets.scorer)
    sampling = Sampling(tokens, temperature, list(range(60)), num_responses)
    return RolloutMaker(nets, scorer, load_tokenizer(Pretrained(model)), sampling, **kwargs)


def make_rollout(nets, model, seed=0, tokens=6, prompts=None, objective=None, role="actor", values=True, **kwargs):
    """A rollout of `nets`."""
    torch.manual_seed(seed)
    return maker(nets, model, tokens, **kwargs).make(
        prompt_batch(model, prompts), objective or MeanReward(), role, values
    )


def make_experience(nets, model, kl_coef=0.05, advantage=None, **kwargs):
    """What an update learns from."""
    advantage = advantage or Gae()
    rollout = make_rollout(nets, model, values=advantage.needs_critic, **kwargs)
    return compute_advantages(rollout, kl_coef, advantage, lambda x: x)


class LoneModule:
    """Stands in for a LightningModule in one process."""

    def __init__(self):
        strategy = SimpleNamespace(reduce=lambda x, reduce_op: x)
        self._trainer = self.trainer = SimpleNamespace(
            world_size=1, global_step=0, strategy=strategy, distributed_sampler_kwargs=None
        )

    def manual_backward(self, loss):
        loss.backward()


def optimizer(nets, lr=1e-2):
    """AdamW on actor and critic."""
    return torch.optim.AdamW([*nets.actor_parameters(), *nets.critic_parameters()], lr=lr, weight_decay=0.0)


def state(module):
    """A copy of everything that trains."""
    return {n: p.detach().clone() for n, p in module.named_parameters() if p.requires_grad}


def ppo_module(model, reward, **kwargs):
    """A small PPO module; keywords override."""
    options = {
        "lora": Lora(4, 16.0),
        "sampling": Sampling(6),
        "update": UpdateSettings(epochs=2, minibatches=2),
        "learning_rate": 1e-2,
        "critic_learning_rate": 1e-2,
        **kwargs,
    }
    return PPOModule(Pretrained(model), reward, **options)


def prompt_data(model, folder, count=16, batch_size=4, validation_fraction=0.0, **kwargs):
    """Prompts in a file of `folder`, as a datamodule."""
    prompts = helpers.tiny_prompts(folder / "ppo_prompts.jsonl", count)
    return PromptDataModule(
        model,
        prompts=prompts,
        batch_size=batch_size,
        max_prompt_length=48,
        validation_fraction=validation_fraction,
        **kwargs,
    )


def trainer(folder, **kwargs):
    """A quiet trainer on the CPU."""
    options = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        **kwargs,
    }
    return Trainer(default_root_dir=folder, **options)


class Recorder(Callback):
    """Keeps the metrics of every iteration."""

    def __init__(self):
        self.rows = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.rows.append({k: float(v) for k, v in trainer.callback_metrics.items()})


def fit_ppo(module, data, folder, ckpt_path=None, **kwargs):
    """Fit a module without validation; the metrics of each iteration."""
    recorder = Recorder()
    options = {"limit_val_batches": 0, **kwargs}
    callbacks = [recorder, *options.pop("callbacks", [])]
    runner = trainer(folder, callbacks=callbacks, **options)
    torch.manual_seed(0)
    runner.fit(module, data, ckpt_path=ckpt_path, weights_only=True)
    return recorder.rows
