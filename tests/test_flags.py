"""Every route to the options makes the same engine; every mistake ends before a model is loaded."""

import copy
import importlib
import json
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.utils.argparse_utils import FlexibleArgumentParser

import rkv_vllm
from rkv_vllm.flags import GROUP_DESCRIPTION, GROUP_TITLE, MIDDLEWARE
from rkv_vllm.options import OPTIONS, ServerOptions, flagged_method_options
from rkv_vllm.plugin import register
from tests.checkpoint_configs import LLAMA, write_config

FLAGS = [
    "--kv-compression=rkv",
    "--kv-budget=96",
    "--kv-buffer=32",
    "--kv-window=4",
    "--kv-lambda=0.25",
    "--kv-pool=5",
    "--kv-threshold=0.75",
    "--kv-option=center=true",
    "--kv-protect=16",
    "--kv-layer-budgets=pyramid",
    "--kv-share-layers=none",
    "--kv-compress-prompt",
    "--kv-prompt-chunk=512",
    "--kv-seats=3",
    "--kv-swap-space=0.5",
    "--kv-experimental-mla",
    "--kv-when=pressure",
    "--kv-max-request-tokens=200",
    "--kv-min-request-buffer=16",
]
OPTIONS_OF_FLAGS = {
    "method": "rkv",
    "budget": 96,
    "buffer": 32,
    "when": "pressure",
    "window": 4,
    "protect": 16,
    "layer_budgets": "pyramid",
    "share_layers": "none",
    "compress_prompt": True,
    "prompt_chunk": 512,
    "seats": 3,
    "swap_space": 0.5,
    "experimental_mla": True,
    "max_request_tokens": 200,
    "min_request_buffer": 16,
    "options": {"lam": 0.25, "pool": 5, "threshold": 0.75, "center": True, "defensive": False},
}


@pytest.fixture(scope="module")
def cli():
    """The parser of the `vllm` command, with `serve` as its only subcommand."""
    register()
    parser = FlexibleArgumentParser()
    ServeSubcommand().subparser_init(parser.add_subparsers(dest="subparser"))
    return parser


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_config(tmp_path_factory.mktemp("llama"), LLAMA)


def parse(cli, *arguments):
    return cli.parse_args(["serve", "some/model", *arguments])


def options(cli, *arguments):
    return parse(cli, *arguments).additional_config["kv_compression"]


def engine_config(engine_args):
    """What compression decides in an engine config, as text: the order of keys counts, too."""
    vllm_config = engine_args.create_engine_config()
    return (
        json.dumps(vllm_config.additional_config),
        vllm_config.scheduler_config.scheduler_cls,
        vllm_config.parallel_config.worker_cls,
        vllm_config.compute_hash(),
    )


def serve_namespace(cli, model, *arguments):
    """The namespace as the serve command leaves it before it makes engine arguments of it."""
    namespace = cli.parse_args(["serve", model, "--skip-tokenizer-init", *arguments])
    namespace.model = namespace.model_tag
    return namespace


def from_command_line(cli, model, *arguments):
    return AsyncEngineArgs.from_cli_args(serve_namespace(cli, model, *arguments))


def test_every_flag_lands_in_additional_config(cli):
    own = {"lam": 0.25, "pool": 5, "threshold": 0.75, "center": "true"}
    assert options(cli, *FLAGS) == {**OPTIONS_OF_FLAGS, "options": own}


@pytest.mark.parametrize(
    "arguments",
    [
        ["--kv-option", "a_b=x=1.5", "c=2", "--kv-option=d="],
        ["--kv_option", "a_b=x=1.5", "--kv_option=c=2", "--kv-option", "c=1", "d=", "c=2"],
    ],
)
def test_options_of_a_method_are_kept_as_texts_until_it_is_known(cli, arguments):
    assert options(cli, *arguments) == {"options": {"a_b": "x=1.5", "c": "2", "d": ""}}


def test_the_former_flag_works_and_is_hidden(cli):
    assert options(cli, "--kv-observation-slots=3") == {"seats": 3}
    assert "observation" not in cli._subparsers._group_actions[0].choices["serve"].format_help()


def test_without_flags_nothing_is_left_in_the_namespace(cli):
    arguments = vars(parse(cli))
    assert arguments["additional_config"] == {}
    assert arguments["middleware"] == []
    assert not [name for name in arguments if name in ("kv_compression", "kv_budget")]


def test_one_parse_leaves_nothing_for_the_next(cli):
    parse(cli, *FLAGS)
    assert parse(cli).additional_config == {}
    assert parse(cli).middleware == []


def test_every_route_of_a_command_line_puts_the_check_of_requests_in_front_once(cli, tmp_path):
    as_json = '--additional-config={"kv_compression": {"method": "rkv"}}'
    file = tmp_path / "serve.yaml"
    file.write_text("kv-compression: rkv\nmiddleware: [mine.Own]\n")
    for arguments, expected in (
        (["--kv-compression=rkv", "--kv-budget=64", as_json], [MIDDLEWARE]),
        ([as_json], [MIDDLEWARE]),
        (["--additional-config.kv_compression.method=rkv"], [MIDDLEWARE]),
        (["--middleware=mine.Own", "--kv-budget=64"], ["mine.Own", MIDDLEWARE]),
        (["--kv-budget=64", "--middleware=mine.Own"], [MIDDLEWARE, "mine.Own"]),
        (["--config", str(file)], [MIDDLEWARE, "mine.Own"]),
        (['--additional-config={"others": 1}'], []),
    ):
        assert parse(cli, *arguments).middleware == expected
    module, _, name = MIDDLEWARE.rpartition(".")
    assert isinstance(getattr(importlib.import_module(module), name), type)


def test_the_environment_puts_the_check_of_requests_in_front_as_well(monkeypatch):
    def parsed(*arguments):
        parser = FlexibleArgumentParser()
        ServeSubcommand().subparser_init(parser.add_subparsers(dest="subparser"))
        return parse(parser, *arguments).middleware

    register()
    monkeypatch.setenv("RKV_COMPRESSION", "rkv")
    assert parsed() == parsed("--kv-budget=64") == [MIDDLEWARE]
    assert parsed("--middleware=mine.Own") == [MIDDLEWARE, "mine.Own"]
    engine_only = EngineArgs.add_cli_args(FlexibleArgumentParser())
    assert "middleware" not in vars(engine_only.parse_args([]))
    for off in ("off", ""):
        monkeypatch.setenv("RKV_COMPRESSION", off)
        assert parsed() == []


def test_where_a_server_takes_no_middleware_it_gets_none(cli, monkeypatch):
    serve = cli._subparsers._group_actions[0].choices["serve"]
    with monkeypatch.context() as patch:
        patch.setattr(serve, "prog", "vllm snapshot create")
        assert parse(cli, "--kv-compression=rkv").middleware == []
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    assert parse(cli, "--kv-compression=rkv").middleware == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["--kv_budget", "96"],
        ["--kv_budget=96"],
        ["--additional-config.kv_compression.budget", "96"],
        ["--additional_config.kv_compression.budget=96"],
        ["--additional-config", '{"kv_compression": {"budget": 96}}'],
    ],
    ids=str,
)
def test_every_spelling_gives_the_same_option(cli, arguments):
    assert options(cli, *arguments) == {"budget": 96}


JSON_BUDGET = ["--additional-config", '{"kv_compression": {"budget": 64, "pool": 5}, "a": 1}']


@pytest.mark.parametrize("other", [JSON_BUDGET, ["--additional-config", "{}"]], ids=str)
def test_order_of_flags_and_json_does_not_matter(cli, other):
    flags = ["--kv-compression", "rkv", "--kv-budget", "96"]
    before, after = parse(cli, *other, *flags), parse(cli, *flags, *other)
    assert before.additional_config == after.additional_config
    assert after.additional_config["kv_compression"]["budget"] == 96
    assert ("a" in after.additional_config) == (other is JSON_BUDGET)


def test_dotted_options_join_flags_and_json(cli):
    dotted = "--additional-config.kv_compression.buffer=32"
    assert options(cli, dotted, "--kv-compression=rkv", *JSON_BUDGET) == {
        "method": "rkv",
        "budget": 64,
        "options": {"pool": 5},
        "buffer": 32,
    }


@pytest.mark.parametrize("json_first", [True, False])
def test_options_of_a_method_join_and_flags_hold(cli, json_first):
    json_options = '{"kv_compression": {"options": {"lam": 0.5, "x": 1}, "pool": 5}}'
    json_flag, flags = ["--additional-config", json_options], ["--kv-lambda=1", "--kv-option=y=2"]
    arguments = [*json_flag, *flags] if json_first else [*flags, *json_flag]
    assert options(cli, *arguments) == {"options": {"lam": 1.0, "x": 1, "pool": 5, "y": "2"}}


def test_negative_threshold_is_read(cli):
    assert options(cli, "--kv-threshold=-0.5") == {"options": {"threshold": -0.5}}


def test_later_flag_replaces_an_earlier_one(cli):
    assert options(cli, "--kv-budget=64", "--kv-budget=96") == {"budget": 96}


def test_other_keys_of_additional_config_behave_as_in_vllm(cli):
    arguments = ["--additional-config", '{"a": 1}', "--additional-config", '{"b": {"c": 2}}']
    assert parse(cli, *arguments).additional_config == {"b": {"c": 2}}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kv-compression", "h2o"], "--kv-compression (method): got 'h2o', wanted one of"),
        (["--kv-compression", "no.such.Method"], "'no.such' says: No module named 'no'; correct"),
        (["--kv-compression"], "expected one argument"),
        (["--kv-budget", "many"], "--kv-budget (budget): got 'many', wanted a whole number"),
        (["--kv-budget", "64.5"], "--kv-budget (budget): got '64.5', wanted a whole number"),
        (["--kv-budget", "0"], "--kv-budget (budget): got 0"),
        (["--kv-buffer", "-3"], "--kv-buffer (buffer): got -3"),
        (["--kv-window", "0"], "--kv-window (window): got 0"),
        (["--kv-lambda", "1.5"], "--kv-lambda (lam): got 1.5"),
        (["--kv-lambda", "nan"], "--kv-lambda (lam): got nan"),
        (["--kv-pool", "4"], "--kv-pool (pool): got 4, wanted an odd number"),
        (["--kv-threshold", "2"], "--kv-threshold (threshold): got 2.0"),
        (["--kv-seats", "0"], "--kv-seats (seats): got 0"),
        (["--kv-observation-slots", "0"], "--kv-seats (seats): got 0"),
        (
            ["--kv-protect", "all"],
            "--kv-protect (protect): got 'all', wanted 'none', 'prompt' or a",
        ),
        (["--kv-option", "lam"], "--kv-option: got 'lam', wanted name=value; write it"),
        (["--kv-option", "=1"], "--kv-option: got '=1', wanted name=value; write it"),
        (
            ["--additional-config.kv_compression.options", "9"],
            "kv_compression.options: got 9, wanted an object of options such as",
        ),
        (["--additional-config", "{oops}"], "argument --additional-config: Value {oops} cannot"),
        (["--additional-config", "{oops"], "--additional-config: got '{oops', wanted a JSON obj"),
        (["--additional-config", "[1]"], "--additional-config: got '[1]', wanted a JSON object"),
        (["--additional-config", '{"kv_compression": 1}'], "kv_compression: got 1, wanted an obj"),
        (["--additional-config.kv_compression.bugdet", "9"], "unknown option 'bugdet'"),
        (["--additional-config.kv_compression.pool", "4"], "--kv-pool (pool): got 4"),
    ],
)
def test_bad_command_line_ends_with_code_2_and_the_reason(cli, capsys, arguments, message):
    with pytest.raises(SystemExit) as end:
        parse(cli, *arguments)
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_yaml_file_and_command_line_combine(cli, tmp_path):
    file = tmp_path / "serve.yaml"
    file.write_text(yaml.safe_dump({"kv-compression": "rkv", "kv_budget": 64, "kv-threshold": 0}))
    assert options(cli, "--config", str(file), "--kv-budget", "96") == {
        "method": "rkv",
        "budget": 96,
        "options": {"threshold": 0.0},
    }
    file.write_text(yaml.safe_dump({"kv-option": ["a=1", "b=2"], "kv-protect": "prompt"}))
    assert options(cli, "--config", str(file)) == {
        "protect": "prompt",
        "options": {"a": "1", "b": "2"},
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kv-budget: many", "--kv-budget (budget): got 'many', wanted a whole number of tokens"),
        ("kv-budget:", "--kv-budget (budget): got 'None', wanted a whole number of tokens"),
        ("kv-bugdet: 9", "unrecognized arguments: --kv-bugdet 9"),
        # YAML reads it as true.
        ("kv-compression: on", "argument --kv-compression: expected one argument"),
        ("additional-config: {kv_compression: {pool: 4}}", "--kv-pool (pool): got 4, wanted an"),
    ],
)
def test_a_bad_yaml_file_ends_with_code_2_and_the_reason(cli, capsys, tmp_path, text, message):
    file = tmp_path / "serve.yaml"
    file.write_text(text)
    with pytest.raises(SystemExit) as end:
        parse(cli, "--config", str(file))
    assert end.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("kv-compression: off", None),
        ("kv-compress-prompt: false\nkv-protect: none", {"protect": "none"}),
        # "kv-threshold: -0.5" is taken for a dotted option by vLLM's parser.
        ("kv-option: [threshold=-0.5]", {"options": {"threshold": "-0.5"}}),
    ],
)
def test_yaml_has_words_of_its_own(cli, tmp_path, text, expected):
    file = tmp_path / "serve.yaml"
    file.write_text(text)
    made = parse(cli, "--config", str(file)).additional_config
    assert made.get("kv_compression") == expected


def test_all_routes_make_the_same_engine(cli, model, tmp_path):
    flat, nested = tmp_path / "flat.yaml", tmp_path / "nested.yaml"
    parts = [flag.removeprefix("--").partition("=") for flag in FLAGS]
    flat.write_text(yaml.safe_dump({name: value or True for name, _, value in parts}))
    nested.write_text(yaml.safe_dump({"additional-config": {"kv_compression": OPTIONS_OF_FLAGS}}))
    as_json = json.dumps({"kv_compression": dict(reversed(OPTIONS_OF_FLAGS.items()))})
    dotted = [
        f"--additional-config.kv_compression.{k}={v if isinstance(v, str) else json.dumps(v)}"
        for k, v in OPTIONS_OF_FLAGS.items()
    ]
    offline = {"model": model, "skip_tokenizer_init": True}
    routes = {
        "flags": from_command_line(cli, model, *FLAGS),
        "json": from_command_line(cli, model, "--additional-config", as_json),
        "dotted": from_command_line(cli, model, *dotted),
        "flat yaml": from_command_line(cli, model, "--config", str(flat)),
        "nested yaml": from_command_line(cli, model, "--config", str(nested)),
        "engine_args": EngineArgs(**offline, **rkv_vllm.engine_args(**OPTIONS_OF_FLAGS)),
        "additional_config": EngineArgs(**offline, additional_config=json.loads(as_json)),
    }
    made = {route: engine_config(engine_args) for route, engine_args in routes.items()}
    assert made["flags"][0] == json.dumps({"kv_compression": OPTIONS_OF_FLAGS})
    assert made["flags"][1:3] == (
        "rkv_vllm.scheduling.scheduler.make_scheduler",
        "rkv_vllm.worker.cpu_worker.CompressionCPUWorker",
    )
    assert dict.fromkeys(routes, made["flags"]) == made


def test_defaults_are_spelled_out_in_the_engine_config(cli, model):
    made = engine_config(from_command_line(cli, model, "--kv-compression", "rkv"))
    assert json.loads(made[0]) == {"kv_compression": ServerOptions().to_dict()}


def test_a_namespace_parsed_in_another_process_keeps_the_options(cli, model):
    # A spawned API server gets the parsed namespace, and no plugin has seen it there.
    script = (
        "import pickle, sys\n"
        "from vllm.engine.arg_utils import AsyncEngineArgs\n"
        "args = AsyncEngineArgs.from_cli_args(pickle.load(sys.stdin.buffer))\n"
        "print(args.create_engine_config().additional_config['kv_compression']['budget'])\n"
    )
    namespace = pickle.dumps(serve_namespace(cli, model, *FLAGS))
    run = subprocess.run([sys.executable, "-c", script], input=namespace, capture_output=True)
    assert run.stdout.decode().split()[-1:] == ["96"], run.stderr.decode()[-2000:]


def test_engine_config_leaves_the_callers_dict_alone_and_keeps_other_keys(model):
    register()
    given = {"kv_compression": {"method": "rkv"}, "other": [1]}
    kept = copy.deepcopy(given)
    arguments = EngineArgs(model=model, skip_tokenizer_init=True, additional_config=given)
    arguments.gdn_prefill_backend = "triton"
    made = arguments.create_engine_config().additional_config
    assert given == kept
    assert made["other"] == [1]
    assert made["gdn_prefill_backend"] == "triton"


def test_protected_tokens_without_room_for_a_compaction_end_the_start(cli, model):
    lengths = ["--kv-budget=64", "--kv-buffer=32", "--kv-protect=16", "--max-model-len"]
    flags = ["--kv-compression=rkv", *lengths]
    from_command_line(cli, model, *flags, "113").create_engine_config()
    with pytest.raises(ValueError, match=r"--kv-protect .*got 16, .* below --max-model-len 112; "):
        from_command_line(cli, model, *flags, "112").create_engine_config()


def test_making_the_engine_config_twice_changes_nothing(cli, model):
    arguments = from_command_line(cli, model, *FLAGS)
    assert engine_config(arguments) == engine_config(arguments)


def test_json_example_of_the_help_is_accepted(cli):
    example = re.search("--additional-config '(.+)'", GROUP_DESCRIPTION).group(1)
    assert options(cli, "--additional-config", example) == {"method": "rkv", "budget": 1024}


def test_the_docs_say_what_the_fields_say():
    page = Path(rkv_vllm.__file__).parents[1] / "docs" / "options.md"
    rows = page.read_text().splitlines()
    for option in {**OPTIONS, **flagged_method_options()}.values():
        default = "off" if option.name == "method" or option.kinds == (bool,) else option.default
        assert f"| `{option.flag}` | {default} | {option.meaning} |" in rows


def test_flag_group_names_meaning_unit_and_default_of_every_option(cli):
    serve = cli._subparsers._group_actions[0].choices["serve"]
    group = next(g for g in serve._action_groups if g.title == GROUP_TITLE)
    actions = {action.option_strings[0]: action for action in group._group_actions}
    flagged = {**OPTIONS, **flagged_method_options()}.values()
    flags = [option.flag for option in flagged]
    assert list(actions) == [*flags, "--kv-option", "--kv-observation-slots"]
    for option in flagged:
        text = actions[option.flag].help
        assert option.meaning in text
        assert (option.wanted or "") in text
        default = "off" if option.name == "method" or option.kinds == (bool,) else option.default
        assert f"(default: {default})" in text


CONNECTOR = '{"kv_connector": "ExampleConnector", "kv_role": "kv_both"}'
BAD_STARTS = {
    # In a file of YAML.
    "values": (
        {"kv-compression": "rkv", "kv-budget": 6},
        "--kv-budget (budget): got 6, wanted more tokens than --kv-window (window) = 8; raise the",
    ),
    "flags": (
        ["--kv-compression=rkv", f"--kv-transfer-config={CONNECTOR}"],
        "KV cache compression does not support KV connectors and KV cache offloading: got connec",
    ),
    "options": pytest.param(
        ["--kv-compression", "rkv", "--kv-option", "strength=3"],
        "--kv-option: got 'strength', wanted an option of the method 'rkv'",
        marks=pytest.mark.nightly,
    ),
    "no switch": pytest.param(
        ["--kv-budget", "512"],
        "kv_compression: got --kv-budget but no method, wanted a method with its options; add",
        marks=pytest.mark.nightly,
    ),
}


@pytest.mark.parametrize(("arguments", "message"), BAD_STARTS.values(), ids=BAD_STARTS)
def test_a_bad_start_ends_with_our_message_before_a_model_is_looked_at(
    model, tmp_path, arguments, message
):
    if isinstance(arguments, dict):
        file = tmp_path / "serve.yaml"
        file.write_text(yaml.safe_dump(arguments))
        arguments = ["--config", str(file)]
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", model]
    run = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=300)
    assert run.returncode == 1, run.stderr[-2000:]
    said = run.stdout + run.stderr
    assert "Traceback" not in said
    assert "Resolved architecture" not in said
    assert said.count(message) == 1
    last, *rest = run.stderr[run.stderr.index("vllm: error: ") :].splitlines()
    assert last.startswith(f"vllm: error: {message}")
    # A method's options may be listed below.
    assert not rest or (rest[0], len(rest)) == ("The method 'rkv' has these options:", 6)
