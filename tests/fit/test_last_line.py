"""What a refused start prints when nobody catches it."""

import sys

import pytest
from vllm.usage.usage_lib import UsageContext

from rkv_vllm.fit.last_line import refusals_as_last_line


@pytest.fixture
def printed_by_python(monkeypatch):
    """Errors that reach Python's own hook."""
    errors = []
    monkeypatch.setattr(sys, "excepthook", lambda kind, error, traceback: errors.append(error))
    return errors


def refuse(*, wanted: bool) -> ValueError:
    refusal = ValueError("--kv-budget: got 6, wanted more")
    with pytest.raises(ValueError, match="got 6") as raised, refusals_as_last_line(wanted=wanted):
        raise refusal
    assert raised.value is refusal
    return refusal


def test_a_refused_server_prints_its_message_and_other_errors_their_traceback(
    printed_by_python, capsys
):
    refusal, other = refuse(wanted=True), ValueError("--kv-budget: got 6, wanted more")
    for error in (refusal, other):
        sys.excepthook(type(error), error, None)
    assert capsys.readouterr().err == "vllm: error: --kv-budget: got 6, wanted more\n"
    assert printed_by_python == [other]


def test_what_is_no_refusal_of_ours_keeps_its_traceback(printed_by_python):
    before = sys.excepthook
    with pytest.raises(KeyError), refusals_as_last_line(wanted=True):
        raise KeyError("a mistake")
    assert sys.excepthook is before


@pytest.mark.parametrize("is_server", [True, False])
def test_only_servers_are_spared_the_traceback(arguments, printed_by_python, is_server):
    before = sys.excepthook
    context = UsageContext.OPENAI_API_SERVER if is_server else UsageContext.LLM_CLASS
    with pytest.raises(ValueError, match="micro-batching"):
        arguments(enable_dbo=True).create_engine_config(context)
    assert (sys.excepthook is not before) == is_server
