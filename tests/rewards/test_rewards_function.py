"""A Python function as a source: what it is given, what it may return, and what is said when it is wrong."""

import re
from dataclasses import replace

import ppo_helpers
import pytest
import torch

from lit_vapo.models.token_rows import TokenRows
from lit_vapo.rewards import FunctionReward, Responses, WeightedSum
from lit_vapo.rewards.function import import_function
from lit_vapo.types import Prompt

TEXTS = [" good", " very bad", " a quiet end", ""]
PROMPTS = ["the film", "the plot was", "Review", "slow"]
USER = {"role": "user", "content": "How was it?"}


def responses(prompts=PROMPTS, texts=TEXTS, columns=None):
    """Responses of one token each, without a model."""
    count = len(texts)
    ones = torch.ones(count, dtype=torch.long)
    rows = TokenRows(torch.arange(2 * count).view(count, 2), ones, ones[:, None].bool())
    return Responses(
        prompts=[Prompt(prompt) for prompt in prompts],
        texts=list(texts),
        finished=torch.ones(count, dtype=torch.bool),
        rows=rows,
        tokenizer=None,
        vocabulary_size=10,
        encode=lambda tokenizer, path: [],
        columns=columns or {},
    )


@pytest.fixture
def source(monkeypatch):
    """Makes a source of a function that is not in a file."""

    def make(function, *args, **kwargs):
        monkeypatch.setattr("reward_functions.under_test", function, raising=False)
        made = FunctionReward("reward_functions:under_test", *args, **kwargs)
        made.prepare(None)
        return made

    return make


# 1. What it is given.


def test_texts_tokens_and_columns_are_given_as_trl_gives_them(source):
    seen = {}

    def reward(prompts, completions, completion_ids, answer, **kwargs):
        seen.update(kwargs, prompts=prompts, completions=completions, completion_ids=completion_ids, answer=answer)
        return [1, 2.5, True, 0]

    made = source(reward)
    estimate = made.score(responses(columns={"answer": [1, 2, 3, 4], "level": ["a", None, "b", "c"]}))
    assert seen == {
        "prompts": PROMPTS,
        "completions": TEXTS,
        "completion_ids": [[1], [3], [5], [7]],
        "answer": [1, 2, 3, 4],
        "level": ["a", None, "b", "c"],
    }
    assert estimate.mean.tolist() == [1.0, 2.5, 1.0, 0.0]
    assert made.columns == ("answer",)


def test_messages_are_given_as_trl_gives_them(source):
    seen = {}

    def reward(prompts, completions):
        seen.update(prompts=prompts, completions=completions)
        prompts[0][0]["content"] = "changed"
        return [0.0] * 3

    begun = {"role": "assistant", "content": "It was"}
    given = responses([[USER], [USER, begun], "text"], [" good", " bad", " so"])
    source(reward).score(given)
    assert seen["completions"] == [
        [{"role": "assistant", "content": " good"}],
        # The response goes on with the message, so both are what the assistant says.
        [{"role": "assistant", "content": "It was bad"}],
        " so",
    ]
    assert seen["prompts"][1:] == [[USER], "text"]
    # A function that changes what it is given changes nothing else.
    assert given.prompts[0].content == [USER] == [{"role": "user", "content": "How was it?"}]
    assert given.prompts[1].content == [USER, begun]


def test_it_gets_only_what_it_takes(source):
    made = source(lambda completions, level=None: [float(level is not None)] * 4)
    assert made.columns == ()
    assert made.score(responses()).mean.sum() == 0
    assert made.score(responses(columns={"level": [1] * 4, "other": [2] * 4})).mean.sum() == 4


def test_a_column_does_not_pass_for_what_ppo_gives(source):
    made = source(lambda completions: [float(len(text)) for text in completions])
    assert made.score(responses(columns={"completions": ["x"] * 4})).mean.tolist() == [5.0, 9.0, 12.0, 0.0]


@pytest.mark.parametrize("path", ["reward_functions.length", "reward_functions:length", "reward_functions:Judge.score"])
def test_it_is_found_by_its_path(path):
    made = FunctionReward(path)
    made.check()
    assert callable(import_function(path))


def test_nothing_is_imported_before_a_run(tmp_path, monkeypatch):
    (tmp_path / "with_effects.py").write_text("raise RuntimeError('ran')")
    monkeypatch.syspath_prepend(tmp_path)
    made = FunctionReward("with_effects:length")
    assert (made.num_members, made.reads()) == (1, None)
    with pytest.raises(ValueError, match="RuntimeError: ran"):
        made.check()


# 2. What it may return.


@pytest.mark.parametrize(
    "returned",
    [
        [1.0, 2.0, 3.0, 4.0],
        (1, 2, 3, 4),
        torch.arange(1, 5),
        torch.arange(1.0, 5.0, requires_grad=True)[:, None],
        torch.arange(1, 5).numpy(),
        [torch.tensor(1.0), torch.arange(2, 3).numpy()[0], [3], 4],
    ],
    ids=["list", "tuple", "tensor", "column", "array", "mixed"],
)
def test_numbers_come_in_any_dress(source, returned):
    estimate = source(lambda prompts: returned).score(responses())
    assert estimate.mean.tolist() == [1.0, 2.0, 3.0, 4.0]
    assert estimate.members.tolist() == [[1.0], [2.0], [3.0], [4.0]]
    assert estimate.variance.tolist() == [0.0] * 4
    assert estimate.reference_variance is None


def test_members_are_normalised_on_the_reference():
    made = FunctionReward("reward_functions:vowels", 2)
    made.prepare(None)
    assert not made.calibrated
    made.calibrate([responses()])
    raw = torch.tensor([[2.0, 10.0], [2.0, 15.0], [5.0, 20.0], [0.0, 10.0]])
    expected = (raw - raw.mean(0)) / raw.std(0)
    estimate = made.score(responses())
    torch.testing.assert_close(estimate.members, expected)
    torch.testing.assert_close(estimate.reference_variance, expected.var(1).mean())


def test_members_may_be_left_as_they_are():
    made = FunctionReward("reward_functions:vowels", 2, normalise=False)
    made.prepare(None)
    # The unit of their variance is measured all the same.
    assert not made.calibrated
    made.calibrate([responses()])
    estimate = made.score(responses())
    assert estimate.members.tolist() == [[2.0, 10.0], [2.0, 15.0], [5.0, 20.0], [0.0, 10.0]]
    assert estimate.reference_variance.item() == pytest.approx((32 + 84.5 + 112.5 + 50) / 4)


def test_an_async_function_is_waited_for():
    made, plain = (FunctionReward(f"reward_functions:{name}") for name in ("waited", "length"))
    for one in (made, plain):
        one.prepare(None)
    assert torch.equal(made.score(responses()).mean, plain.score(responses()).mean)


def test_an_async_function_is_waited_for_in_a_notebook():
    import asyncio

    made = FunctionReward("reward_functions:waited")
    made.prepare(None)

    async def cell():
        return made.score(responses())

    assert asyncio.run(cell()).mean.tolist() == pytest.approx([0.5, 0.9, 1.2, 0.0])


# 3. Where it does not apply.


def test_none_adds_nothing_to_a_sum():
    # Prompts of even length are the first (8), the second (12), the third (6) and the last (4): make two odd.
    given = responses(["the film", "the plots was", "Review", "slows"])
    names = {"one": "to_the_even", "two": "length"}
    made = WeightedSum({name: FunctionReward(f"reward_functions:{x}") for name, x in names.items()}, {"one": 10.0})
    made.prepare(None)
    estimate = made.score(given)
    assert estimate.mean.tolist() == pytest.approx([50.5, 0.9, 121.2, 0.0])
    assert estimate.applies is None
    assert estimate.parts["one"].applies.tolist() == [True, False, True, False]


def test_none_has_no_variance_and_counts_in_the_unit():
    given = responses(["the film", "the plots was", "Review", "slows"])
    made = FunctionReward("reward_functions:two_to_the_even", 2)
    made.prepare(None)
    made.calibrate([given])
    estimate = made.score(given)
    assert estimate.variance[[1, 3]].tolist() == [0.0, 0.0]
    assert estimate.mean[[1, 3]].tolist() == [0.0, 0.0]
    torch.testing.assert_close(estimate.reference_variance, estimate.variance.mean())
    # Origin and unit are those of the responses that it applies to.
    torch.testing.assert_close(estimate.members[[0, 2]].mean(0), torch.zeros(2), atol=1e-6, rtol=0)


def test_none_alone_is_an_error_that_names_the_prompt(tiny_model_dir, tmp_path):
    reward = ppo_helpers.ensemble(tmp_path / "ensemble", tiny_model_dir)
    nets = ppo_helpers.networks(tiny_model_dir, reward)
    made = FunctionReward("reward_functions:to_the_even")
    made.prepare(None)
    nets.__dict__["scorer"] = made
    with pytest.raises(
        ValueError, match=r"expected a reward of each response, got none .* for prompt 'the plot was go'"
    ):
        ppo_helpers.make_rollout(nets, tiny_model_dir, prompts=["the film", "the plot was go"])


def test_calibration_needs_two_that_it_applies_to():
    made = FunctionReward("reward_functions:two_to_the_even", 2)
    made.prepare(None)
    with pytest.raises(ValueError, match="two_to_the_even: expected rewards of at least 2 reference responses, got 1"):
        made.calibrate([responses(["the film", "odd", "odd", "odd"])])


# 4. What is refused.


def raises(prompts):
    raise KeyError("no such key")


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            lambda prompts: [1.0] * 3,
            "expected 4 rewards, one for each response, got 3 (the first prompt is 'the film')",
        ),
        (lambda prompts: None, "expected a list of 4 rewards, got None"),
        (lambda prompts: 1.0, "expected a list of 4 rewards, got 1.0"),
        (lambda prompts: "1234", "expected a list of 4 rewards, got '1234'"),
        (lambda prompts: [1, 2, float("nan"), 4], "expected finite numbers or None, got nan for prompt 'Review'"),
        (lambda prompts: [1, 2, 3, float("inf")], "expected finite numbers or None, got inf for prompt 'slow'"),
        (lambda prompts: [1, "2", 3, 4], "expected finite numbers or None, got '2' for prompt 'the plot was'"),
        (
            lambda prompts: [1, [2, 3], 4, 5],
            "expected 1 numbers a response (num_members), got 2 for prompt 'the plot was'",
        ),
        (
            raises,
            "expected rewards, got KeyError: 'no such key' (in a batch of 4 responses, the first to prompt 'the film')",
        ),
    ],
)
def test_bad_returns_are_named(source, function, message):
    with pytest.raises(ValueError, match=re.escape(f"reward function reward_functions:under_test: {message}")):
        source(function).score(responses())


def test_members_that_are_missing_are_named(source):
    made = source(lambda prompts: [[1, 2], [1, 2], [1], [1, 2]], 2)
    with pytest.raises(
        ValueError, match=re.escape("expected 2 numbers a response (num_members), got 1 for prompt 'Rev")
    ):
        made.calibrate([responses()])


def test_the_cause_is_kept(source):
    with pytest.raises(ValueError, match="KeyError") as caught:
        source(raises).score(responses())
    assert isinstance(caught.value.__cause__, KeyError)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("length", "got 'length'"),
        ("reward_functions:", "got 'reward_functions:'"),
        (
            "no_such_module.length",
            "got 'no_such_module.length' (ModuleNotFoundError: No module named 'no_such_module')",
        ),
        ("reward_functions.heigth", "got 'reward_functions.heigth' (AttributeError: "),
        ("reward_functions:NUMBER", "got 'reward_functions:NUMBER', which is a int"),
    ],
)
def test_what_cannot_be_imported_is_named(path, message):
    start = "reward function: expected a function that can be imported, as my_rewards.length, "
    with pytest.raises(ValueError, match=re.escape(start + message)):
        FunctionReward(path).check()


def test_signatures_that_do_not_fit_are_named(source):
    with pytest.raises(ValueError, match="expected parameters among prompts, .* got 'trainer_state', which only TRL"):
        source(lambda completions, trainer_state: [])
    with pytest.raises(ValueError, match="expected a function that takes keywords, got 'texts' without one"):
        source(eval("lambda texts, /: []"))
    with pytest.raises(ValueError, match="num_members: expected at least 1, got 0"):
        FunctionReward("reward_functions:length", 0)


def test_texts_may_come_without_tokens(source):
    given = replace(responses(), rows=None)
    assert (
        source(lambda completions, completion_ids=None: [float(completion_ids is None)] * 4).score(given).mean.sum()
        == 4
    )
    with pytest.raises(ValueError, match=r"expected responses with their tokens \(completion_ids\), got texts alone"):
        source(lambda completion_ids: [0.0] * 4).score(given)


def test_a_missing_column_is_named():
    made = FunctionReward("reward_functions:answered")
    made.prepare(None)
    with pytest.raises(ValueError, match="answered: expected a column 'answer' beside the prompts, got level"):
        made.score(responses(columns={"level": [1] * 4}))
    given = replace(responses(), columns={"answer": ["good", "good", "end", "x"]})
    assert made.score(given).mean.tolist() == [1.0, 0.0, 1.0, 0.0]
