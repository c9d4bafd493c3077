"""The demo's task as a study: SmolLM2-135M, ensembles that learn from what people called positive, the gold judge.

What the study needs beside the demo's own files is made by

    python -m examples.sentiment.study --demo runs/demo

and configs/study/sentiment.yaml is the study.
"""

from __future__ import annotations

import json
from functools import cached_property
from itertools import islice
from pathlib import Path

import torch
from jsonargparse import auto_cli
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from examples.sentiment.judge import SentimentJudge
from examples.sentiment.prepare import once
from lit_vapo.data.encoder import Encoder
from lit_vapo.models.pretrained import Pretrained
from lit_vapo.rewards.features import compute_features
from lit_vapo.rewards.reward_model import FeatureSpec
from lit_vapo.study.experiments.learned import LearnedEnsemble
from lit_vapo.study.experiments.learner import draw_stated
from lit_vapo.study.experiments.reference_responses import feature_model, reference_responses
from lit_vapo.study.experiments.truth import PromptValues, Truth
from lit_vapo.types import FeaturePairs, Prompt, TextReward, TokenSequence

FEATURES = "features.safetensors"
RESPONSE_TOKENS, TIMES = 16, 8  # of the reference's responses, and how many to each prompt


def feature_spec(demo: Path) -> FeatureSpec:
    """What the ensembles read, as in configs/reward/demo.yaml."""
    return FeatureSpec(Pretrained(str(demo / "policy-base")), pooling="mean", layer=16)


class SentimentStudy(LearnedEnsemble):
    """The demo, repeated: every repetition draws its own pairs of what people called positive and negative.

    The true return is the mean of the gold judge, P(positive). Setting, methods and estimator are those of
    `LearnedEnsemble`.
    """

    @cached_property
    def truth(self) -> Truth:
        """The judge, a middle layer of SmolLM2, and the demo's prompts for training."""
        known = self.known
        return Truth(
            feature_spec(self.prepared),
            self.prepared / "data" / "prompts_train.jsonl",
            known["reference"],
            judge=SentimentJudge(str(self.prepared / "judge")),
            response_tokens=RESPONSE_TOKENS,
            prompts=PromptValues(known["prompt_ids"], known["prompt_values"]),
        )

    @cached_property
    def known(self) -> dict[str, Tensor]:
        """What was prepared.

        Features (N, H) of `chosen` and `rejected` of the demo's pairs and of responses of the `reference`, and what the
        judge says of several responses to each prompt (`prompt_ids`, `prompt_values`).

        Raises:
            ValueError: They were not prepared.
        """
        path = self.prepared / "study" / FEATURES
        if not path.is_file():
            raise ValueError(f"expected {path}, which `python -m examples.sentiment.study` writes")
        return load_file(path)

    def preferences(self, pairs: int, flipped: float, seed: int) -> FeaturePairs:
        """Pairs of the demo, without repetition.

        Raises:
            ValueError: There are fewer.
        """
        return draw_stated(self.known["chosen"], self.known["rejected"], pairs, flipped, seed)


def judged(judge: TextReward, tokenizer: PreTrainedTokenizerBase, responses: list[TokenSequence]) -> Tensor:
    """What a judge says of responses, (B,)."""
    cut = [(s.ids[: s.prompt_length], s.ids[s.prompt_length :]) for s in responses]
    texts = [[tokenizer.decode(side, skip_special_tokens=True) for side in sides] for sides in cut]
    return judge(*map(list, zip(*texts, strict=True)))


@torch.inference_mode()
def prepare(demo: str = "runs/demo", seed: int = 0) -> None:
    """Prepare the study: what ensembles read of the demo's pairs, and responses of the reference.

    Args:
        demo: Folder that examples.sentiment.prepare filled.
        seed: Seed of the responses.
    """
    root = Path(demo)
    spec = feature_spec(root)

    def write(folder: Path) -> None:
        folder.mkdir(parents=True)
        model = feature_model(spec)
        tokenizer, cpu = model.load_tokenizer(), torch.device("cpu")
        encoder = Encoder(tokenizer)
        with (root / "data" / "preferences.jsonl").open(encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
        found = {
            side: compute_features(
                model, [encoder.response(Prompt(row["prompt"]), row[side], ended=False) for row in rows], cpu
            )
            for side in ("chosen", "rejected")
        }
        prompts = root / "data" / "prompts_train.jsonl"
        ids, answers = reference_responses(spec, prompts, RESPONSE_TOKENS, seed, batch_size=64)
        judge, gold = SentimentJudge(str(root / "judge")), []
        for responses in islice(answers, TIMES):
            if not gold:
                found["reference"] = compute_features(model, responses, cpu)
            gold.append(judged(judge, tokenizer, responses))
        found |= {"prompt_ids": ids, "prompt_values": torch.stack(gold).mean(0)}
        save_file({name: x.contiguous() for name, x in found.items()}, folder / FEATURES)
        error = float(found["prompt_values"].std() / len(ids) ** 0.5)
        print(f"reference: gold {float(found['prompt_values'].mean()):.3f} ± {error:.3f} on {len(ids)} prompts")

    once(root / "study", "features", write)


if __name__ == "__main__":
    auto_cli(prepare, as_positional=False)
