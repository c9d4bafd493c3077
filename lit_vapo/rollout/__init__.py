"""Generate, score, assemble: prompts in; responses, log-probabilities, rewards and their variance out."""

from lit_vapo import models
from lit_vapo.plugins import import_all
from lit_vapo.rollout.maker import RolloutMaker
from lit_vapo.rollout.reference_sampling import reference_responses, sample_references, sampled_responses
from lit_vapo.rollout.responses import Encoders, text_responses, token_responses
from lit_vapo.rollout.rollout import Rollout, assemble_rows

__all__ = [
    "Encoders",
    "Rollout",
    "RolloutMaker",
    "assemble_rows",
    "reference_responses",
    "sample_references",
    "sampled_responses",
    "text_responses",
    "token_responses",
]

# Generators live among the models.
import_all(models.__name__, models.__path__, "_generator")
