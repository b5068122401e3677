"""What the card shows of the environment."""

from rkv_vllm.bench.card import make_card


def test_secrets_are_not_shown(monkeypatch):
    secrets = ("VLLM_API_KEY", "VLLM_HUB_TOKEN", "VLLM_CLIENT_SECRET", "VLLM_DB_PASSWORD")
    for name in secrets:
        monkeypatch.setenv(name, "hidden")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "2")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    card = make_card("folder/of/model")
    assert "hidden" not in str(card)
    shown = card["environment"]
    assert (shown["VLLM_CPU_KVCACHE_SPACE"], shown["OMP_NUM_THREADS"]) == ("2", "1")
