"""Messages reach a reward model in its own chat template, whatever the policy's is."""

import ppo_helpers
import pytest
import torch
from helpers import tiny_model, tiny_tokenizer, write_jsonl

from lit_vapo.data.datamodule import PromptDataModule
from lit_vapo.data.tokenise import load_text_tokenizer, pair_encoder
from lit_vapo.models.reward import RewardModel
from lit_vapo.objectives.mean_reward import MeanReward

OTHER = (
    "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] | trim }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
TURNS = [[{"role": "user", "content": text}] for text in ("Name a film.", "Was it good?", "Why?")]


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    """An ensemble on a model of its own, whose tokenizer has another chat template."""
    path = tmp_path_factory.mktemp("judge")
    tokenizer = tiny_tokenizer(path / "model")
    tokenizer.chat_template = OTHER
    model = tiny_model(path / "model", tokenizer, seed=3)
    return ppo_helpers.ensemble(path / "ensemble", model)


def batch(model, folder, rows):
    file = write_jsonl(folder / "prompts.jsonl", rows)
    return PromptDataModule(model, prompts=file, validation_fraction=0.0, batch_size=8).prompt_batches("train", 8)[0]


def test_a_reward_is_what_a_direct_call_scores(tiny_model_dir, judge, tmp_path):
    prompts = batch(tiny_model_dir, tmp_path, [{"prompt": turns} for turns in TURNS])
    assert prompts.messages == TURNS
    assert all(text.startswith("<bos>user:") for text in prompts.prompts)  # the policy's own template
    nets = ppo_helpers.networks(tiny_model_dir, judge)
    rollout = ppo_helpers.maker(nets, tiny_model_dir).make(prompts, MeanReward())
    assert rollout.stopped.any()
    model = RewardModel.from_pretrained(judge)
    tokenizer = model.load_tokenizer()
    for i, turns in enumerate(TURNS):
        response = rollout.responses[i]
        # Written out by hand: the template, less the line break after the end of the last turn.
        start = f"[user] {turns[0]['content']}<eos>\n[assistant] "
        end = f"{response.strip()}<eos>" if rollout.stopped[i] else response
        ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (start, end)]
        row = torch.tensor([ids[0] + ids[1]])
        score = model(row, torch.tensor([row.shape[1]]), torch.tensor([len(ids[0])]))
        torch.testing.assert_close(rollout.estimate.members[i], score.members[0], atol=1e-5, rtol=1e-5)


def test_each_response_to_a_prompt_meets_its_messages(tiny_model_dir, judge, tmp_path):
    prompts = batch(tiny_model_dir, tmp_path, [{"prompt": turns} for turns in TURNS])
    maker = ppo_helpers.maker(ppo_helpers.networks(tiny_model_dir, judge), tiny_model_dir)
    maker.sampling.num_responses = 2
    seen = []
    maker._reward_encoder = lambda prompt, response, ended, messages: (
        seen.append(messages) or pair_encoder(RewardModel.from_pretrained(judge).load_tokenizer())(prompt, "a", True)
    )
    maker.make(prompts, MeanReward())
    assert seen == [turns for turns in TURNS for _ in range(2)]


def test_messages_come_from_every_shape_of_row(tiny_model_dir, tmp_path):
    answers = [[{"role": "assistant", "content": x}] for x in "AB"]
    rows = [
        {"prompt": TURNS[0]},
        {"prompt": TURNS[1][0]["content"], "chosen": answers[0], "rejected": answers[1]},
        {"chosen": TURNS[2] + answers[0], "rejected": TURNS[2] + answers[1]},
        {"prompt": "plain text"},
    ]
    for row, expected in zip(rows, [*TURNS, None], strict=True):
        prompts = batch(tiny_model_dir, tmp_path, [row])
        assert prompts.to(torch.device("cpu")).messages == [expected]


def test_without_a_template_the_text_stays_as_it_is(tiny_model_dir, tmp_path):
    tiny_tokenizer(tmp_path)
    encode = pair_encoder(load_text_tokenizer(str(tmp_path)))
    assert encode("<bos>user:a", "b", True, TURNS[0]) == encode("<bos>user:a", "b", True)
    refusing = load_text_tokenizer(tiny_model_dir)
    refusing.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(
        ValueError, match=r"reward: expected messages that the chat template of .* roles must alternate"
    ):
        pair_encoder(refusing)("a", "b", True, TURNS[0])
