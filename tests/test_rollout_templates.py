"""Messages reach a reward model in its own chat template, whatever the policy's is."""

import ppo_helpers
import pytest
import torch
from helpers import CHAT, tiny_model, tiny_tokenizer, write_jsonl
from transformers import AutoConfig, AutoModelForCausalLM

from lit_vapo.data.datamodule import PromptDataModule
from lit_vapo.objectives.mean_reward import MeanReward
from lit_vapo.rewards.reward_model import RewardModel

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
    assert [prompt.content for prompt in prompts.asked] == TURNS
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
    rollout = maker.make(prompts, MeanReward())
    tokenizer = RewardModel.from_pretrained(judge).load_tokenizer()
    seen = []
    (encoder,) = maker._encoders._encoders.values()
    response = encoder.response
    encoder.response = lambda prompt, *rest: seen.append(prompt.content) or response(prompt, *rest)
    maker.make(prompts, MeanReward())
    assert seen == [turns for turns in TURNS for _ in range(2)]
    assert len(rollout.prompts) == 6
    assert tokenizer.chat_template == OTHER


def test_messages_come_from_every_shape_of_row(tiny_model_dir, tmp_path):
    answers = [[{"role": "assistant", "content": x}] for x in "AB"]
    rows = [
        {"prompt": TURNS[0]},
        {"prompt": TURNS[1][0]["content"], "chosen": answers[0], "rejected": answers[1]},
        {"chosen": TURNS[2] + answers[0], "rejected": TURNS[2] + answers[1]},
        {"prompt": "plain text"},
    ]
    for row, expected in zip(rows, [*TURNS, "plain text"], strict=True):
        prompts = batch(tiny_model_dir, tmp_path, [row])
        assert [prompt.content for prompt in prompts.to(torch.device("cpu")).asked] == [expected]


def judge_with(folder, template, **other):
    """An ensemble whose tokenizer has this chat template, and the policy's tokens unless `other` changes them."""
    tokenizer = tiny_tokenizer(folder / "model", **other)
    tokenizer.chat_template = template
    return ppo_helpers.ensemble(folder / "ensemble", tiny_model(folder / "model", tokenizer, seed=3))


@pytest.mark.parametrize("template", [CHAT, None], ids=["same template", "none"])
def test_an_ensemble_of_the_same_tokens_reads_what_was_written(tiny_model_dir, tmp_path, template):
    reward = judge_with(tmp_path, template)
    prompts = batch(tiny_model_dir, tmp_path, [{"prompt": turns} for turns in TURNS])
    nets = ppo_helpers.networks(tiny_model_dir, reward)
    assert not nets.scorer.taps
    rollout = ppo_helpers.maker(nets, tiny_model_dir, num_responses=2).make(prompts, MeanReward())
    model, rows = RewardModel.from_pretrained(reward), rollout.rows
    for i, length in enumerate(rows.lengths.tolist()):
        score = model(rows.input_ids[i : i + 1, :length], rows.lengths[i : i + 1], rows.prompt_lengths[i : i + 1])
        torch.testing.assert_close(rollout.estimate.members[i], score.members[0], atol=1e-5, rtol=1e-5)


def test_messages_for_an_ensemble_of_other_tokens_need_its_template(tiny_model_dir, tmp_path):
    prompts = batch(tiny_model_dir, tmp_path, [{"prompt": TURNS[0]}])
    refusing = {None: "expected a tokenizer with a chat template", "{{ raise_exception('no') }}": "takes, got: no"}
    for number, (template, message) in enumerate(refusing.items()):
        reward = judge_with(tmp_path / str(number), template, pad=False)
        maker = ppo_helpers.maker(ppo_helpers.networks(tiny_model_dir, reward), tiny_model_dir)
        with pytest.raises(ValueError, match="reward: .*" + message):
            maker.make(prompts, MeanReward())


def test_tokens_that_an_ensemble_has_no_embedding_for_are_read_anew(tmp_path):
    wide = tiny_model(tmp_path / "wide", tiny_tokenizer(tmp_path / "wide", chat_template=True))
    for config in (AutoConfig.from_pretrained(wide),):
        config.vocab_size = 400
        AutoModelForCausalLM.from_config(config).save_pretrained(wide)
    nets = ppo_helpers.networks(wide, judge_with(tmp_path, CHAT))
    rollout = ppo_helpers.make_rollout(nets, wide, tokens=30)
    assert rollout.rows.input_ids.max() >= 312
    assert torch.isfinite(rollout.reward).all()
