"""The demo's task without PPO: many responses of SmolLM2-135M to each held-out prompt, and what the judge says of them.

    python -m examples.sentiment.responses --demo runs/demo

makes what configs/study/sentiment_optima.yaml needs beside the files of examples.sentiment.study.
"""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import torch
from jsonargparse import auto_cli
from safetensors.torch import load_file

from examples.sentiment.judge import SentimentJudge
from examples.sentiment.prepare import once
from examples.sentiment.study import FEATURES, RESPONSE_TOKENS, feature_spec, judged
from lit_vapo.rewards.features import compute_features
from lit_vapo.study.experiments.reference_responses import feature_model, reference_responses
from lit_vapo.study.experiments.responses import KnownResponses

TIMES = 32  # responses to each prompt


@torch.inference_mode()
def prepare(demo: str = "runs/demo", seed: int = 0) -> None:
    """Prepare the study.

    Args:
        demo: Folder that examples.sentiment.prepare and examples.sentiment.study filled.
        seed: Seed of the responses.
    """
    root = Path(demo)
    spec = feature_spec(root)

    def write(folder: Path) -> None:
        pairs = load_file(root / "study" / FEATURES)
        model, judge, cpu = feature_model(spec), SentimentJudge(str(root / "judge")), torch.device("cpu")
        tokenizer = model.load_tokenizer()
        prompts = root / "data" / "prompts_test.jsonl"
        _, answers = reference_responses(spec, prompts, RESPONSE_TOKENS, seed, batch_size=64)
        rounds = list(islice(answers, TIMES))
        features = torch.stack([compute_features(model, responses, cpu) for responses in rounds], 1)
        true = torch.stack([judged(judge, tokenizer, responses) for responses in rounds], 1)
        KnownResponses(features, true, pairs["chosen"], pairs["rejected"]).save(folder)
        print(f"{true.shape[1]} responses to each of {len(true)} prompts, gold {float(true.mean()):.3f}")

    once(root / "responses", "responses", write)


if __name__ == "__main__":
    auto_cli(prepare, as_positional=False)
