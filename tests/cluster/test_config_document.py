from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.config import ClusterConfig, load_config
from cluster.config_document import effective_yaml, example_yaml
from cluster.config_errors import setting_names

EXAMPLE = Path(__file__).resolve().parents[2] / "deploy" / "config.example.yaml"


def lookup(tree: Any, path: tuple[str, ...]) -> Any:
    for part in path:
        tree = tree[part]
    return tree


def test_the_example_file_is_up_to_date() -> None:
    assert EXAMPLE.read_text() == example_yaml(), "run `make example`"


def test_the_example_file_holds_the_defaults() -> None:
    assert load_config(EXAMPLE) == ClusterConfig()


def test_the_example_file_names_every_setting() -> None:
    tree = yaml.safe_load(EXAMPLE.read_text())
    for path in setting_names(ClusterConfig):
        if "engine" in path[:-1] and path[0] == "pools":
            continue  # a pool's engine names only what differs: nothing, by default
        lookup(tree, path)  # KeyError when it is missing
    assert tree["pools"]["decode"]["engine"] == {}


def test_the_other_files_of_deploy_are_configurations() -> None:
    config = load_config(EXAMPLE.parent / "ray-job.yaml")
    assert config.ray.address == "auto"


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"model.name": "org/Some-Model_7B", "model.served_name": "123", "log_level": "debug"},
        {"model.served_name": "null", "worker.host": "::1", "engine.kv_cache_memory": 1_000_001},
        {"supervisor.backoff_max_s": 1e6, "worker.timeout_s": 2.25, "transfer.channels": ["tcp"]},
        {"pools.decode.engine": {"max_num_seqs": 7, "num_blocks": None, "kv_cache_memory": "3MiB"}},
        {"engine.speculation.method": "draft", "engine.speculation.draft_model": "/models/small one"},
        {"pools.decode.engine": {"speculation": {"method": "ngram", "max_tokens": 2}, "max_num_seqs": 7}},
        {
            "redis.sentinels": ["a:1", "b"],
            "redis.master": "m",
            "redis.tls": True,
            "redis.ca_file": "/etc/ca.pem",
        },
        {
            "router.tenants": [
                {"name": "a-b", "api_keys_file": "/etc/keys of a", "weight": 2.5, "max_queue": 0},
                {"name": "default", "share_cache": True, "max_tokens_per_minute": None},
            ]
        },
    ],
)
def test_what_is_printed_can_be_read_back(tmp_path: Path, overrides: dict[str, Any]) -> None:
    config = load_config(None, overrides)
    path = tmp_path / "printed.yaml"
    path.write_text(effective_yaml(config))
    again = load_config(path)
    assert again == config
    for role in ("prefill", "decode"):
        assert again.pool_engine(role) == config.pool_engine(role)


def test_secrets_are_masked() -> None:
    text = effective_yaml(
        load_config(
            None,
            {
                "security.cluster_secret": "s" * 20,
                "redis.url": "redis://:hunter2@host:6379",
                "router.http.api_keys": ["key-of-a-client"],
                "router.tenants": [{"name": "acme", "api_keys": ["key-of-a-tenant"]}],
            },
        )
    )
    for secret in ("s" * 20, "hunter2", "key-of-a-client", "key-of-a-tenant"):
        assert secret not in text
    assert text.count("********") == 4
    yaml.safe_load(text)
