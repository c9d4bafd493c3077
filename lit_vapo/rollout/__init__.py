"""Generate, score, assemble: prompts in; responses, log-probabilities, rewards and their variance out."""

from lit_vapo.rollout.maker import RolloutMaker
from lit_vapo.rollout.reference_sampling import reference_responses, sample_references
from lit_vapo.rollout.responses import Encoders, text_responses, token_responses
from lit_vapo.rollout.rollout import Rollout, assemble_rows

__all__ = [
    "Encoders",
    "Rollout",
    "RolloutMaker",
    "assemble_rows",
    "reference_responses",
    "sample_references",
    "text_responses",
    "token_responses",
]
