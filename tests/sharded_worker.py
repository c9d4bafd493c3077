"""PPO in one process or, by torchrun, in two that share the weights: what is left stands in a file for each kind."""

import os
import sys
import warnings
from pathlib import Path

import ppo_helpers
import torch
from lightning.pytorch import Callback
from torch import nn
from torch.distributed.tensor import DTensor

from lit_vapo.advantages.rloo import Rloo
from lit_vapo.data.collate import pad
from lit_vapo.models.critic import CriticSpec
from lit_vapo.models.generation import Generated, Generator, Sampling
from lit_vapo.models.pretrained import Lora, Pretrained
from lit_vapo.models.sharding import whole
from lit_vapo.models.transformers_generator import TransformersGenerator
from lit_vapo.stages.ppo.evaluation import AVERAGE
from lit_vapo.stages.ppo.module import PPOModule
from lit_vapo.stages.ppo.update import UpdateSettings
from lit_vapo.stages.sharing import sharers
from lit_vapo.stages.strategy import ShardedStrategy

# Prompts of a batch over all processes.
TOGETHER = 8


class SeededByPrompt(Generator):
    """Samples token by token, with numbers that follow from the prompt, however prompts are dealt out."""

    def __call__(self, lm, tokenizer, prompt_ids, prompt_lengths, sampling, stops):
        each, size = sampling.num_responses, prompt_ids.shape[1]
        mask = (torch.arange(size) >= size - prompt_lengths[:, None]).long().repeat_interleave(each, 0)
        ids = prompt_ids.repeat_interleave(each, 0)
        seeds = [int(row[-int(n) :].double().square().sum()) for row, n in zip(prompt_ids, prompt_lengths, strict=True)]
        sources = [torch.Generator().manual_seed(seed * 100 + j) for seed in seeds for j in range(each)]
        for _ in range(sampling.max_new_tokens):
            logits = lm(input_ids=ids, attention_mask=mask).logits[:, -1].float()
            noise = torch.stack([torch.rand(logits.shape[1], generator=source) for source in sources])
            ids = torch.cat([ids, (logits - (-noise.log()).log()).argmax(1, keepdim=True)], 1)
            mask = nn.functional.pad(mask, (0, 1), value=1)
        responses = ids[:, size:]
        # Lengths differ too, so that processes would need differently many batches.
        lengths = responses.sum(1) % sampling.max_new_tokens + 1
        return Generated(responses, lengths, lengths < sampling.max_new_tokens)


LORA = Lora(4, 16.0)


def ppo(lora=LORA, base=None, reward="heads", **kwargs):
    """A recipe."""

    def make(folders):
        options = {
            "lora": lora,
            "sampling": Sampling(6),
            "update": UpdateSettings(epochs=2, minibatches=1, micro_batch_tokens=60, entropy_coef=0.01),
            "learning_rate": 1e-3,
            "critic_learning_rate": 1e-3,
            "kl_target": 0.5,
            "generator": SeededByPrompt(),
            **kwargs,
        }
        return PPOModule(Pretrained(str(folders / "model"), **(base or {})), str(folders / reward), **options)

    return make


KINDS = {
    "lora_critic": ppo(critic=CriticSpec("lora"), reward="inner"),
    "lora_own": ppo(critic=CriticSpec("own"), base={"gradient_checkpointing": True}, ema_decay=0.5),
    "full_own": ppo(lora=None, critic=CriticSpec("own"), kl_estimator="exact", ema_decay=0.5),
    "rloo": ppo(advantage=Rloo(), sampling=Sampling(6, num_responses=2), kl_estimator="exact"),
    "members": ppo(reward="members"),
    "4bit": ppo(base={"quantization": "4bit"}),
    "8bit": ppo(base={"quantization": "8bit"}),
}


def said_greedily(trainer, module):
    """What the policy most likely answers to a few prompts; each process asks its share, the first one most."""
    prompts = [[5, 6, 7], [9], [20, 21], [30, 31, 32, 33, 34], [40, 41]]
    world, rank = sharers(module)
    mine = prompts if world == 1 else (prompts[:4], prompts[4:])[rank]
    ids, lengths = pad(mine, left=True)
    sampling = Sampling(24, temperature=1e-6, num_responses=2)
    policy = module.networks.policy
    with policy.acting_as("actor") as lm:
        # So many stops that the processes end at different times.
        found = TransformersGenerator()(lm, None, ids, lengths, sampling, list(range(0, 200, 2)))
    ends = zip(found.response_ids.tolist(), found.response_lengths.tolist(), strict=True)
    said = [row[:length] for row, length in ends]
    if world == 1:
        return said
    everybody = [None] * trainer.world_size
    torch.distributed.all_gather_object(everybody, said)
    # Processes that see the same rows stand next to each other, and say the same.
    each = trainer.world_size // world
    assert everybody[::each] == everybody[each - 1 :: each]
    return [row for rows in everybody[::each] for row in rows]


# Processes that see different rows, and a strategy for each name that Lightning does not know.
STRATEGIES = {
    "tensor": (1, lambda: ShardedStrategy(tensor_parallel_size=2)),
    "both": (2, lambda: ShardedStrategy(data_parallel_size=2, tensor_parallel_size=2)),
}


class Keep(Callback):
    """Keeps what a fit leaves: what it logs in each iteration, the weights, and what the policy would say."""

    def __init__(self, path):
        self.path = path
        self.logged = []

    def on_train_batch_end(self, trainer, pl_module, *args):
        # What is timed; and halves of minibatches, which are others in each process, and none where weights are cut.
        unlike = ("second", "iteration", "actor_grad_cosine", "actor_grad_signal")
        found = trainer.callback_metrics.items()
        self.logged.append(
            {k: float(v) for k, v in found if k.startswith("train/") and not any(t in k for t in unlike)}
        )

    def on_fit_end(self, trainer, pl_module):
        said = said_greedily(trainer, pl_module)
        named = pl_module.named_parameters()
        weights = {n: whole(p.detach()).clone() for n, p in named if p.requires_grad or n.startswith(AVERAGE)}
        sharded = any(isinstance(p, DTensor) for p in pl_module.parameters())
        if trainer.is_global_zero:
            left = {"logged": self.logged, "weights": weights, "sharded": sharded, "said": said}
            torch.save(left, self.path)


def run(kind, folder, world=1, strategy="auto", **kwargs):
    """A fit of one kind."""
    shares, chosen = STRATEGIES.get(strategy, (world, lambda: strategy))
    options = {"batch_size": TOGETHER // shares, "validation_fraction": 0.25}
    data = ppo_helpers.prompt_data(str(folder / "model"), folder, **options)
    torch.manual_seed(0)
    keep = Keep(folder / f"{kind}_{world}_{strategy}.pt")
    options = {"max_epochs": 3, "max_steps": 4, "log_every_n_steps": 1, "callbacks": [keep], **kwargs}
    trainer = ppo_helpers.trainer(
        folder / f"{kind}_{world}_{strategy}",
        devices=world,
        strategy=chosen(),
        **options,
    )
    trainer.fit(KINDS[kind](folder), data)
    return trainer


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    place, strategy = sys.argv[1:3]
    for kind in sys.argv[3:] or KINDS:
        run(kind, Path(place), world=int(os.environ["WORLD_SIZE"]), strategy=strategy)
