"""On vLLM's page stand our metrics with its labels, and nothing of ours without compression."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import prometheus_client
import pytest
from prometheus_client.parser import text_string_to_metric_families
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.metrics.loggers import PrometheusStatLogger, StatLoggerManager
from vllm.v1.metrics.prometheus import unregister_vllm_metrics
from vllm.v1.metrics.stats import SchedulerStats

import rkv_vllm
from rkv_vllm.frontend.stat_logger import CompressionStatLogger
from rkv_vllm.scheduling.directive import REASONS
from rkv_vllm.scheduling.step_stats import StepStats
from tests.checkpoint_configs import LLAMA, write_config

ROOT = Path(rkv_vllm.__file__).parents[1]
DASHBOARD = ROOT / "examples" / "grafana.json"
OPERATIONS = ROOT / "docs" / "operations.md"
ADVICE = ROOT / "docs" / "operations.md"
OURS = "vllm:kv_compression_"
FAMILIES = {
    "compactions": "counter",
    "pressure_steps": "counter",
    "evicted_tokens": "counter",
    "freed_blocks": "counter",
    "deferred": "counter",
    "looping_requests": "counter",
    "swapped_out": "counter",
    "swapped_in": "counter",
    "recomputed": "counter",
    "swap_bytes": "gauge",
    "logical_tokens": "gauge",
    "physical_tokens": "gauge",
    "seats_in_use": "gauge",
    "first_due_tokens": "gauge",
    "evicted_tokens_per_compaction": "histogram",
}
STEP = StepStats(
    [33, 70], 3, 2, 1, 4, 900, 700, 5, 3, 2, {"space": 1}, 4096, {"buffer": 1, "pressure": 1}, 6
)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return write_config(tmp_path_factory.mktemp("llama"), LLAMA)


@pytest.fixture(autouse=True)
def _empty_registry() -> Iterator[None]:
    yield
    unregister_vllm_metrics()


def engine_config(model: str, compression: bool = True):
    options = rkv_vllm.engine_args(budget=96, buffer=32) if compression else {}
    return EngineArgs(
        model=model, served_model_name="some-model", skip_tokenizer_init=True, **options
    ).create_engine_config()


def manager_of(vllm_config, engines: list[int], plugins=(CompressionStatLogger,)):
    """vLLM's loggers as an API server makes them."""
    manager = StatLoggerManager(vllm_config, engines, custom_stat_loggers=list(plugins))
    manager.log_engine_initialized()
    return manager


def report(manager: StatLoggerManager, step: StepStats, engine: int) -> None:
    stats = SchedulerStats()
    step.attach_to(stats)
    manager.record(stats, None, engine_idx=engine)


def page() -> dict:
    """Families of /metrics by name."""
    text = prometheus_client.generate_latest(prometheus_client.REGISTRY).decode()
    return {family.name: family for family in text_string_to_metric_families(text)}


def sample(name: str, **labels: str) -> float:
    labels = {"model_name": "some-model", "engine": "0", **labels}
    return prometheus_client.REGISTRY.get_sample_value(f"{OURS}{name}", labels)


def test_page_has_every_metric_from_the_start(model):
    manager_of(engine_config(model), [0])
    ours = {name.removeprefix(OURS): f for name, f in page().items() if name.startswith(OURS)}
    # Without a prefix of files, prometheus_client tells when each counter was made.
    assert {n: f.type for n, f in ours.items() if not n.endswith("_created")} == FAMILIES
    assert [sample("deferred_total", reason=reason) for reason in ("seat", "blocks")] == [0, 0]
    assert [sample("compactions_total", reason=reason) for reason in REASONS] == [0, 0, 0]
    for name in (
        "looping_requests_total",
        "pressure_steps_total",
        "physical_tokens",
        "evicted_tokens_per_compaction_count",
    ):
        assert sample(name) == 0


def test_page_without_compactions_says_from_where_on_there_are_any(model):
    """Nothing was compacted, and nothing said so.

    https://github.com/WeianMao/triattention/issues/24
    """
    manager = manager_of(engine_config(model), [0, 1])
    report(manager, StepStats(logical_tokens=100, physical_tokens=100), 1)
    assert sample("compactions_total", engine="1", reason="buffer") == 0
    # Budget and buffer; requests shorter than that keep their whole cache.
    assert sample("first_due_tokens", engine="1") == 96 + 32 > sample("logical_tokens", engine="1")


def test_steps_add_up_and_gauges_show_the_last(model):
    manager = manager_of(engine_config(model), [0])
    report(manager, STEP, 0)
    report(manager, StepStats([7], 1, 0, 4, 2, 500, 400, 2, reasons={"buffer": 1}), 0)
    manager.record(None, None)
    manager.record(SchedulerStats(), None)
    assert [sample("compactions_total", reason=reason) for reason in REASONS] == [2, 1, 0]
    assert sample("evicted_tokens_per_compaction_count") == 3
    assert sample("pressure_steps_total") == 6
    assert sample("evicted_tokens_total") == sample("evicted_tokens_per_compaction_sum") == 110
    assert sample("freed_blocks_total") == 4
    assert sample("deferred_total", reason="seat") == 2
    assert sample("deferred_total", reason="blocks") == 5
    assert sample("looping_requests_total") == 6
    assert sample("evicted_tokens_per_compaction_bucket", le="10.0") == 1
    assert sample("evicted_tokens_per_compaction_bucket", le="50.0") == 2
    assert (sample("swapped_out_total"), sample("swapped_in_total")) == (3, 2)
    assert sample("recomputed_total", reason="space") == 1
    assert sample("recomputed_total", reason="groups") == 0
    gauges = ("logical_tokens", "physical_tokens", "seats_in_use", "swap_bytes")
    assert [sample(name) for name in gauges] == [500, 400, 2, 0]


def test_engines_are_told_apart_with_vllms_labels(model):
    manager = manager_of(engine_config(model), [0, 3])
    report(manager, STEP, 3)
    assert sample("compactions_total", engine="0", reason="pressure") == 0
    assert sample("compactions_total", engine="3", reason="pressure") == 1
    assert sample("logical_tokens", engine="3") == 900
    families = page()
    theirs = [s.labels for s in families["vllm:num_requests_running"].samples]
    ours = [s.labels for s in families[f"{OURS}logical_tokens"].samples]
    assert ours == theirs


def test_vllms_own_prometheus_logger_is_there_and_unchanged(model):
    kinds = [type(each) for each in manager_of(engine_config(model), [0]).stat_loggers]
    assert kinds[0] is CompressionStatLogger
    assert kinds[-1] is PrometheusStatLogger


def test_engine_without_compression_has_vllms_page_only(model):
    manager_of(engine_config(model, compression=False), [0], plugins=())
    stock = {(f.name, f.type, f.documentation) for f in page().values()}
    # Should vLLM find the plugin all the same (two engines in one process), it stays silent.
    manager = manager_of(engine_config(model, compression=False), [0])
    report(manager, STEP, 0)
    assert {(f.name, f.type, f.documentation) for f in page().values()} == stock
    assert not any("kv_compression" in name for name, *_ in stock)
    assert "vllm:num_requests_running" in page()


def dashboard_queries() -> Iterator[str]:
    dashboard = json.loads(DASHBOARD.read_text())
    for panel in dashboard["panels"]:
        yield from (target["expr"] for target in panel.get("targets", ()))
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            yield variable["query"]


def test_dashboard_asks_for_metrics_that_exist_and_for_all_of_ours(model):
    manager_of(engine_config(model), [0])
    samples = {s.name: s.labels.keys() for f in page().values() for s in f.samples}
    asked = set()
    for query in dashboard_queries():
        names = re.findall(r"vllm:\w+", query)
        assert names, query
        labels = set(re.findall(r"(\w+)=~?\"", query))
        for names_in_by in re.findall(r"by \(([\w, ]+)\)", query):
            labels |= set(names_in_by.split(", "))
        for name in names:
            assert name in samples, query
            assert labels <= samples[name] | {"le"}, query
        asked.update(names)
    advised = re.findall(r"vllm:\w+", OPERATIONS.read_text())
    assert f"{OURS}looping_requests_total" in advised
    assert set(advised) <= samples.keys()
    ours = {name for name in samples if name.startswith(OURS) and not name.endswith("_created")}
    histogram = {name for name in ours if "per_compaction" in name}
    assert ours - histogram <= asked
    assert asked & histogram


def test_alerts_that_the_docs_advise_are_about_metrics_that_exist(model):
    manager_of(engine_config(model), [0])
    families = page()
    rows = [line for line in ADVICE.read_text().splitlines() if line.startswith("|")]
    alerts = [row.split("|")[1] for row in rows if "vllm:" in row]
    assert len(alerts) >= 4
    for alert in alerts:
        for name, label in re.findall(r"(vllm:\w+)(?:{(\w+)=)?", alert):
            (samples,) = [f.samples for f in families.values() if name.startswith(f.name)][:1]
            labels = [s.labels.keys() for s in samples if s.name == name]
            assert labels, alert
            assert not label or label in labels[0], alert


def test_dashboard_panels_do_not_overlap_and_have_titles_and_units():
    dashboard = json.loads(DASHBOARD.read_text())
    places = set()
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & places, panel["title"]
        assert max(x for x, _ in cells) < 24
        places |= cells
        assert panel["title"]
        assert panel["description"]
        assert panel["fieldConfig"]["defaults"]["unit"]
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids)
