import numpy as np
import pytest
import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from examples.sentiment import judge as judge_module
from examples.sentiment.judge import PREFIX, WORDS, SentimentJudge, train_judge
from lit_vapo.types import TextReward

GOOD, BAD, REST = ["lovely", "moving", "funny"], ["dull", "dreadful", "empty"], ["film", "story", "cast", "plot"]


def sentences(count):
    """Labelled sentences that one word decides, each word before each noun."""
    labels = [i % 2 == 0 for i in range(count)]
    texts = [f"a {(GOOD if y else BAD)[i // 2 % 3]} {REST[i // 6 % 4]}" for i, y in enumerate(labels)]
    return texts, labels


def tiny_encoder(folder):
    """A random BERT that knows the words above, where the package keeps its own."""
    words = ["[PAD]", "[UNK]", "a", "and", *GOOD, *BAD, *REST]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")
    fast.save_pretrained(folder / "model")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=5,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    BertModel(config).save_pretrained(folder / "model")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A judge, trained on tiny data with a stub for the encoder's package."""
    root = tmp_path_factory.mktemp("judge")
    tiny_encoder(root)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(judge_module, "package_folder", lambda name, install: root)
        train_judge(*sentences(140), root / "judge")
    return root / "judge"


def encoder_judge(folder):
    """The judge with both views counting alike: of its own, the tiny encoder has nothing to add to the words."""
    judge = SentimentJudge(str(folder))
    judge.arrays = {**judge.arrays, "final_coef": np.array([1.0, 1.0])}
    return judge


def test_the_judge_tells_good_from_bad(folder):
    judge = SentimentJudge(str(folder))

    assert isinstance(judge, TextReward)
    p = judge([PREFIX, PREFIX], [" a lovely film", " a dull plot"])
    assert p.dtype == torch.float32
    assert p.shape == (2,)
    assert 0 <= p[1] < 0.2
    assert 0.8 < p[0] <= 1


def test_the_generic_opening_does_not_count_but_the_opening_of_the_review_does(folder):
    judge = encoder_judge(folder)

    whole, bare = judge([f"{PREFIX} a lovely"], [" film"]), judge.probabilities(["a lovely film"])
    assert whole.item() == pytest.approx(bare[0], rel=1e-6)
    assert judge([f"{PREFIX} a dull"], [" film"]).item() < 0.5 < whole.item()


def test_a_text_scores_the_same_alone_as_among_longer_ones(folder):
    judge = encoder_judge(folder)
    texts = ["a funny cast", "a dull film and a lovely story and a dreadful plot and a moving cast", "empty"]

    together = judge.probabilities(texts)

    alone = np.concatenate([judge.probabilities([text]) for text in texts])
    np.testing.assert_allclose(together, alone, rtol=1e-4)


def test_the_word_scores_are_those_of_scikit_learn(folder):
    judge = SentimentJudge(str(folder))
    texts, labels = sentences(140)
    cut = 140 * 6 // 7
    words = TfidfVectorizer(**WORDS)
    reference = LogisticRegression(C=3.0, max_iter=300).fit(words.fit_transform(texts[:cut]), labels[:cut])

    scores = judge.words.transform(texts) @ judge.arrays["word_coef"] + judge.arrays["word_bias"]

    np.testing.assert_allclose(scores, reference.decision_function(words.transform(texts)), rtol=1e-6)


def test_the_saved_judge_holds_arrays_and_words_only(folder):
    kinds = {path.suffix for path in folder.rglob("*") if path.is_file()}

    assert kinds <= {".safetensors", ".json", ".txt"}


def test_there_must_be_a_judge(tmp_path):
    with pytest.raises(ValueError, match=r"expected a judge .*prepare.* got '.*nothing'"):
        SentimentJudge(str(tmp_path / "nothing"))
