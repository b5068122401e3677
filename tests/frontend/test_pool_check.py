"""Requests that the pool can never hold are told apart from those that are compressed into it."""

import pytest
from vllm import SamplingParams

from rkv_vllm.frontend.pool_check import Engine, check_pool
from rkv_vllm.limits import Limits
from rkv_vllm.options import ServerOptions
from rkv_vllm.request_options import RequestOptionError, RequestOptions

SERVER = ServerOptions(budget=64, buffer=32, compress_prompt=True, prompt_chunk=96)
LIMITS = Limits(max_model_len=4096, max_step_tokens=64, steps_in_flight=1)
ENGINE = Engine(LIMITS, block_size=32, num_blocks=8)
PARAMS = SamplingParams(max_tokens=100)
OWN = RequestOptions(64, 32, "none", compress_prompt=True)


def test_a_long_prompt_fits_where_it_is_compressed():
    check_pool(PARAMS, OWN, SERVER, ENGINE, 3000)


@pytest.mark.parametrize("num_prompt_tokens", [10, 3000])
def test_inputs_of_a_session_add_up_to_what_no_pool_of_that_size_holds(num_prompt_tokens):
    with pytest.raises(RequestOptionError, match="resumable"):
        check_pool(PARAMS, OWN, SERVER, ENGINE, num_prompt_tokens, resumable=True)
    check_pool(PARAMS, OWN, SERVER, ENGINE._replace(num_blocks=128), 10, resumable=True)


@pytest.mark.parametrize(("when", "needed"), [("always", 10), ("pressure", 11)])
def test_under_pressure_a_request_needs_what_it_grows_by_until_it_can_be_compacted(when, needed):
    lengths = {"budget": 300, "buffer": 9, "window": 9, "prompt_chunk": 9}
    server = ServerOptions(**lengths, compress_prompt=True, when=when)
    own = RequestOptions(300, 9, "none", compress_prompt=True)
    check_pool(PARAMS, own, server, ENGINE._replace(num_blocks=needed), 3000)
    with pytest.raises(RequestOptionError, match=f"take up to {needed} blocks"):
        check_pool(PARAMS, own, server, ENGINE._replace(num_blocks=needed - 1), 3000)
