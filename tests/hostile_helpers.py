"""Folders and checkpoints that ask for more than they should."""

import json

import pytest
import torch

from lit_vapo.models.digests import seal
from lit_vapo.models.pretrained import Pretrained
from lit_vapo.rewards.members.heads import HeadEnsemble
from lit_vapo.rewards.reward_model import FeatureSpec, RewardModel

# What libraries say to whoever meets a protection, and no user of ours should hear.
ADVICE = ("weights_only", "trust_remote_code=True", "trust_remote_code=`True`", "huggingface.co", "torch.load")
HEAD = "lit_vapo.rewards.members.heads.HeadEnsemble"
EVIL = "open({marker!r}, 'w').close()\nfrom lit_vapo.rewards.members.heads import HeadEnsemble as Evil\n"


def refused(match, call, *args, **kwargs):
    """The sentence with which a call is refused."""
    with pytest.raises((ValueError, FileExistsError), match=match) as caught:
        call(*args, **kwargs)
    message = str(caught.value)
    assert not [word for word in ADVICE if word in message], message
    return message


def head(members=2):
    """A head of width 32."""
    made = HeadEnsemble(members)
    made.build(32)
    return made


def ensemble(folder, model):
    """A sound ensemble of two members."""
    RewardModel(FeatureSpec(Pretrained(model)), head(), None).save_pretrained(folder)
    return folder


def edit(path, **values):
    """Change keys of a JSON file; a dot leads to an inner one."""
    config = json.loads(path.read_text())
    for key, value in values.items():
        *outer, last = key.split("__")
        place = config
        for name in outer:
            place = place[name]
        place[last] = value
    path.write_text(json.dumps(config))
    # Whoever means harm notes the digests of what he changed.
    seal(path.parent)


def checkpoint(path, stage="reward", state=None, **settings):
    """A checkpoint as small as one can be, of the stage and with the hyperparameters that are given."""
    contents = {
        "state_dict": state if state is not None else {f"head.{k}": v for k, v in head().state_dict().items()},
        "hyper_parameters": {"_instantiator": "lightning.pytorch.cli.instantiate_module", **settings},
        "pytorch-lightning_version": "2.6.6",
        "lit_vapo_stage": stage,
        "epoch": 0,
        "global_step": 1,
    }
    torch.save(contents, path)
    return path
