"""Options of the built-in methods: what is refused, and what the page says of them."""

import re
from pathlib import Path

import pytest

from rkv_vllm.methods import Need, available_methods, get_method
from rkv_vllm.option_field import options_of
from rkv_vllm.options import ServerOptions
from rkv_vllm.request_options import RequestOptionError, read_request_options

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "methods.md").read_text()
NO_OPTIONS = ["keydiff", "knorm", "random"]
BAD = [
    ("snapkv", {"pool": 4}, "pool: got 4, wanted an odd number of tokens from 1 to 63; change it"),
    ("snapkv", {"lam": 0.5}, "got 'lam', wanted an option of the method 'snapkv'; correct its"),
    ("recent", {"sinks": -1}, "sinks: got -1, wanted a whole number of tokens, at least 0; change"),
    ("recent", {"sinks": "four"}, "sinks: got 'four', wanted a whole number of tokens, at least"),
    ("vase", {"sinks": 1.5}, "sinks: got 1.5, wanted a whole number of tokens, at least 0; change"),
    ("vase", {"share": 1.01}, "share: got 1.01, wanted a number from 0 to 1; change it or leave"),
    ("vase", {"share": "nan"}, "share: got nan, wanted a number from 0 to 1; change it or leave"),
    ("vase", {"pool": 64}, "pool: got 64, wanted an odd number of tokens from 1 to 63; change it"),
    ("vase", {"threshold": 0.5}, "got 'threshold', wanted an option of the method 'vase'; correct"),
]


@pytest.mark.parametrize(("method", "options", "message"), BAD, ids=str)
def test_a_bad_option_is_refused_with_a_list_of_those_there_are(method, options, message):
    with pytest.raises(ValueError, match=re.escape(message)) as refused:
        ServerOptions(method=method, options=options)
    *_, listing = str(refused.value).partition(f"\nThe method '{method}' has these options:")
    for name, each in options_of(get_method(method).Options).items():
        assert (
            f"\n  {name}: {each.meaning} Takes {each.takes}. (default: {each.default})" in listing
        )


@pytest.mark.parametrize("method", NO_OPTIONS)
def test_a_method_without_options_says_so(method):
    with pytest.raises(
        ValueError, match=rf"'{method}'; correct .*\nThe method .* has no options\."
    ):
        # As --kv-pool 5 arrives, a flag that every method's command line has.
        ServerOptions(method=method, pool=5)


def test_flags_of_rkv_set_what_another_method_calls_the_same():
    assert ServerOptions(method="vase", pool=7).method_options.pool == 7


@pytest.mark.parametrize("method", ["random", "vase"])
def test_a_budget_within_the_window_is_refused_by_name(method):
    wanted = r"--kv-budget .*got 64, wanted more tokens than --kv-window \(window\) = 64; raise the"
    with pytest.raises(ValueError, match=wanted):
        ServerOptions(method=method, window=64, budget=64)
    with pytest.raises(ValueError, match=r"--kv-window \(window\): got 129, wanted .* 1 to 128"):
        ServerOptions(method=method, window=129)
    server = ServerOptions(method=method, window=64, budget=65)
    with pytest.raises(RequestOptionError, match="more tokens than this server's --kv-window 64"):
        read_request_options({"kv_budget": 64}, server)


def test_a_request_sets_what_its_method_lets_it():
    server = ServerOptions(method="vase", window=64)
    own = read_request_options({"kv_option": ["share=0.5", "sinks=0"]}, server).method_options
    assert (own.share, own.sinks, own.pool) == (0.5, 0, 5)
    with pytest.raises(RequestOptionError, match="options that a request can set: sinks, share"):
        read_request_options({"kv_option": "pool=7"}, server)
    with pytest.raises(RequestOptionError, match=r"a request can set: none; .*\n.*has no options"):
        read_request_options({"kv_option": "pool=7"}, ServerOptions(method="random"))


@pytest.mark.parametrize("method", available_methods())
def test_the_page_names_each_method_with_its_needs_options_and_defaults(method):
    (row,) = [line for line in PAGE.splitlines() if line.startswith(f"| `{method}` |")]
    cls = get_method(method)
    cells = [cell.strip() for cell in row.split("|")[1:-1]]
    _, _, source, needs, options, _ = cells
    assert "arXiv:" in source
    assert ("queries" in needs) == (cls.need(cls.Options()) == Need(queries=True))
    said = ", ".join(
        f"`{name}` {str(each.default).lower() if each.default is not None else ''}".strip()
        for name, each in options_of(cls.Options).items()
    )
    assert options == (said or "-")
