"""What a chat template must not do: grow, loop, or fail in its own words."""

import threading

import pytest

pytest.importorskip("jinja2")

from dflash_decode.chat_template import budget as template_budget
from dflash_decode.checkpoint import CheckpointError
from tests.support import template_attacks
from tests.support.templates import ours, user


@pytest.fixture
def small_limits(monkeypatch):
    """A hundredth of the limits: what is stopped is stopped alike, and sooner."""
    monkeypatch.setattr(template_budget, "LARGEST", (1 << 18, 16))
    monkeypatch.setattr(template_budget, "CHARACTERS", (1 << 20, 1024))
    monkeypatch.setattr(template_budget, "STEPS", (1 << 16, 8))


ENDED = "must (have|be|take) "


@pytest.mark.parametrize("name", [*template_attacks.GROW, *template_attacks.LOOPS])
def test_a_template_that_grows_or_loops_is_stopped(small_limits, name):
    template = (template_attacks.GROW | template_attacks.LOOPS)[name]
    with pytest.raises(CheckpointError, match=f"^model: the chat template failed: .*{ENDED}"):
        ours(template, [user("x")])


@pytest.mark.parametrize("template", ["{{ 'a' * 10**10 }}", *(template_attacks.LOOPS[name] for name in (
    "nested loops", "searching from the right", "splitting from the right", "stripping many characters"))])
def test_the_limits_as_they_are_stop_a_template(template):
    with pytest.raises(CheckpointError, match=ENDED):
        ours(template, [user("x")])


@pytest.mark.parametrize("name", template_attacks.FAULTS)
def test_every_fault_of_a_template_is_a_checkpoint_error(name):
    template, message = template_attacks.FAULTS[name]
    with pytest.raises(CheckpointError, match=f"(?s)^model: the chat template failed: .*{message}"):
        ours(template, [user("x")])


def test_threads_pay_each_for_itself():
    entered, left, seen = threading.Event(), threading.Event(), []

    def other():
        with template_budget.spending() as theirs:
            entered.set()
            left.wait()
            seen.append(template_budget.budget() is theirs)

    thread = threading.Thread(target=other)
    with template_budget.spending() as mine:
        thread.start()
        entered.wait()
        seen.append(template_budget.budget() is mine)
        left.set()
        thread.join()
    assert seen == [True, True]
