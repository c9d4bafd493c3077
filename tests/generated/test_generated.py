"""A part of the generated inputs, the same each time; `python -m tests.generated` tries any number of others."""

import pytest
from helpers import last
from hypothesis import HealthCheck, Phase, given, settings

from tests.generated import world
from tests.generated.kinds import KINDS
from tests.generated.outcome import outcome

# Runs and exports take longest.
FEW, MANY = 3, 20
QUICK = ("rows", "dialogues", "prompts", "Parquet")


@pytest.fixture(scope="module", autouse=True)
def runs(request):
    """The runs that other tests share, in place of some of one's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(world, "model", lambda: request.getfixturevalue("tiny_model_dir"))
        patch.setattr(world, "checkpoint", lambda stage: str(last(request.getfixturevalue(f"{stage}_run"))))
        yield


@pytest.mark.parametrize("kind", KINDS, ids=[kind.name for kind in KINDS])
def test_generated_inputs_are_right_or_refused(kind):
    @settings(
        max_examples=MANY if any(word in kind.name for word in QUICK) else FEW,
        phases=[Phase.generate],
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(kind.cases)
    def check(case):
        found = outcome(kind, case)
        assert not found.fault, f"{found.word}: {found.said}"

    check()
