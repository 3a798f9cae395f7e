from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from cluster.config import ClusterConfig, ConfigError, load_config
from cluster.config_errors import setting_names
from cluster.config_source import parse_setting
from workers.protocol.redis_address import RedisAddress


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return path


def mistakes(path: Path | None = None, **overrides: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(path, {name.replace("__", "."): value for name, value in overrides.items()})
    assert "pydantic" not in str(caught.value)
    return caught.value.mistakes


def test_defaults_are_a_whole_configuration() -> None:
    config = load_config()
    assert (config.pools.prefill.replicas, config.pools.decode.replicas) == (1, 1)
    assert config.redis.url is None
    assert config.ray.address is None
    assert config.pool_engine("decode") == config.engine


def test_a_file_needs_only_what_differs(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, "router:\n  http: {port: 8080}\nengine:\n  kv_cache_memory: 2GiB\n"))
    assert config.router.http.port == 8080
    assert config.router.http.host == "127.0.0.1"
    assert config.engine.kv_cache_memory == 2 * 1024**3


@pytest.mark.parametrize("text", ["", "# nothing\n", "router:\n"])
def test_empty_files_and_sections_are_defaults(tmp_path: Path, text: str) -> None:
    assert load_config(write(tmp_path, text)) == ClusterConfig()


def test_overrides_stand_above_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, "pools: {decode: {replicas: 3}, prefill: {replicas: 2}}\n")
    config = load_config(path, {"pools.decode.replicas": 5, "model.name": "x"})
    assert (config.pools.prefill.replicas, config.pools.decode.replicas, config.model.name) == (2, 5, "x")


def test_a_pool_overrides_only_what_it_names() -> None:
    config = load_config(
        None, {"engine.max_num_seqs": 8, "engine.dtype": "float32", "pools.decode.engine.max_num_seqs": 128}
    )
    assert config.pool_engine("prefill").max_num_seqs == 8
    assert config.pool_engine("decode").max_num_seqs == 128
    assert config.pool_engine("decode").dtype == "float32"


def test_a_pool_overrides_parts_of_a_section_and_of_a_rule() -> None:
    config = load_config(
        None,
        {
            "engine.speculation.method": "ngram",
            "engine.max_num_batched_tokens": 2048,
            "engine.num_threads": 2,
            "pools.decode.engine.speculation.max_tokens": 2,
            "pools.decode.engine.max_num_seqs": 1000,
            "pools.decode.engine.cpus": [2, 3],
        },
    )
    decode = config.pool_engine("decode")
    assert (decode.speculation.method, decode.speculation.max_tokens) == ("ngram", 2)
    assert (decode.max_num_seqs, decode.max_num_batched_tokens, decode.cpus) == (1000, 2048, [2, 3])
    assert config.pool_engine("prefill") == config.engine


def test_a_rule_broken_by_a_pool_names_it() -> None:
    [mistake] = mistakes(engine__max_num_seqs=256, pools__decode__engine__max_num_batched_tokens=128)
    assert mistake.startswith("pools.decode.engine, put over engine: max_num_batched_tokens (128) must be")
    [mistake] = mistakes(pools__decode__engine__cpus=[0, 1])
    assert mistake.startswith("pools.decode.engine, put over engine: cpus lists 2 cores, num_threads is None")


def test_a_pool_can_take_a_value_back_to_null() -> None:
    config = load_config(None, {"engine.num_blocks": 64, "pools.decode.engine.num_blocks": None})
    assert config.pool_engine("prefill").num_blocks == 64
    assert config.pool_engine("decode").num_blocks is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "router:\n  http:\n    prt: 1\n",
            ":3: router.http.prt: no such setting; did you mean router.http.port?",
        ),
        ("routr: {http: {port: 1}}\n", ":1: routr: no such setting; did you mean router?"),
        ("router:\n  port: 1\n", ":2: router.port: no such setting; did you mean router.http.port?"),
        ("max_num_seqs: 1\n", ":1: max_num_seqs: no such setting; did you mean engine.max_num_seqs?"),
        ("model: {name: x}\nzzzz: 1\n", ":2: zzzz: no such setting"),
        (
            "pools:\n  decode:\n    engine: {max_seqs: 1}\n",
            ":3: pools.decode.engine.max_seqs: no such setting; did you mean pools.decode.engine.max_num_seqs?",
        ),
    ],
)
def test_unknown_settings_are_named_with_the_nearest(tmp_path: Path, text: str, expected: str) -> None:
    path = write(tmp_path, text)
    assert mistakes(path) == [f"{path}{expected}"]


@pytest.mark.parametrize(
    ("setting", "value", "expected"),
    [
        (
            "router.http.port",
            70000,
            "router.http.port: 70000 is not allowed: must be less than or equal to 65535",
        ),
        ("engine.device", "gpu", "engine.device: 'gpu' is not allowed: must be 'auto', 'cpu' or 'cuda'"),
        (
            "pools.decode.replicas",
            0,
            "pools.decode.replicas: 0 is not allowed: must be greater than or equal to 1",
        ),
        (
            "pools.prefill.replicas",
            -1,
            "pools.prefill.replicas: -1 is not allowed: must be greater than or equal",
        ),
        ("engine.kv_cache_memory", "4XB", "must be a number of bytes, e.g. 512MiB or 2GiB"),
        ("pools", 5, "pools: is a section, it takes settings below it, not 5"),
        ("cluster", "A b", "cluster: 'A b' is not allowed: must be 1 to 40 lower-case letters"),
        ("ray.address", "ray://head:10001", "must be null, `auto` or host:port"),
        ("redis.url", "http://x", "must begin with redis://, rediss:// or unix://"),
        ("redis.url", "redis://host:port/0", "redis.url: the value is not allowed: Port could not be cast"),
        ("redis.url", "redis://[::1", "redis.url: the value is not allowed: Invalid IPv6 URL"),
        (
            "router.http.api_keys",
            [""],
            "router.http.api_keys.0: the value is not allowed: must not be empty",
        ),
        ("router.http.api_keys", ["a\n"], "nor begin or end with a space"),
        ("router.http.api_keys", ["sha256:ABC"], "must be followed by 64 lower-case hexadecimal digits"),
        ("router.tenants", [{"name": "a b"}], "router.tenants.0.name: 'a b' is not allowed: must be 1 to 64"),
        (
            "router.tenants",
            [{"name": "a", "api_keys": ["k"], "min_priority": 3}],
            "min_priority (3) is above priority (0)",
        ),
        ("router.tenants", [{"name": "default", "weight": 0}], "router.tenants.0.weight: 0 is not allowed"),
        ("security.cluster_secret", "short", "must have at least 16 characters"),
    ],
)
def test_wrong_values_are_told_with_what_is_allowed(setting: str, value: Any, expected: str) -> None:
    (line,) = mistakes(**{setting.replace(".", "__"): value})
    assert line.startswith("command line: ")
    assert expected in line


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("security.cluster_secret", "hunter2"),
        ("redis.url", "http://:hunter2@host"),
        ("router.http.api_keys", ["hunter2 "]),
        ("router.http.api_keys", "hunter2"),
        ("router.http.api_keys", ["sha256:hunter2"]),
        ("router.tenants", [{"name": "a", "api_keys": ["hunter2 "]}]),
        ("router.tenants", [{"name": "a", "api_keys": "hunter2"}]),
        ("router.tenants", {"api_keys": ["hunter2"]}),
        ("router.tenants", [{"api_keys": ["hunter2"], "min_priority": 2, "name": "a"}]),
        ("router.tenants", [{"api_keys": ["hunter2"], "name": "a"}, {"api_keys": ["hunter2"], "name": "b"}]),
    ],
)
def test_wrong_secrets_are_not_repeated(setting: str, value: Any) -> None:
    (line,) = mistakes(**{setting.replace(".", "__"): value})
    assert setting.removeprefix("router.") in line
    assert "hunter2" not in line


@pytest.mark.parametrize(
    ("tenants", "expected"),
    [
        ([{"name": "a"}], "tenants.0 (a) has neither api_keys nor api_keys_file"),
        ([{"name": "default"}] * 2, "tenants.1.name is 'default', and so is an earlier one"),
        (
            [{"name": "a", "api_keys": ["k"]}, {"name": "b", "api_keys": ["k"]}],
            "tenants.1.api_keys.0 (b) is a key of a already",
        ),
        ([{"name": "b", "api_keys": ["of-default"]}], "tenants.0.api_keys.0 (b) is a key of default already"),
    ],
)
def test_tenants_must_agree(tenants: list[dict[str, Any]], expected: str) -> None:
    (line,) = mistakes(router__http__api_keys=["of-default"], router__tenants=tenants)
    assert expected in line


def test_a_date_that_is_none_is_a_mistake_like_any_other(tmp_path: Path) -> None:
    path = write(tmp_path, "model:\n  name: 2024-13-45\n")
    assert mistakes(path) == [f"{path}: not valid YAML: month must be in 1..12"]
    with pytest.raises(ConfigError, match="quote it if it is text"):
        parse_setting("model.name=2024-13-45")


def test_every_mistake_is_listed(tmp_path: Path) -> None:
    path = write(tmp_path, "routr: 1\nengine: {block_size: 0}\nworker: {heartbeat_s: -1}\n")
    assert [line.split(": ")[1] for line in sorted(mistakes(path))] == [
        "routr",
        "engine.block_size",
        "worker.heartbeat_s",
    ]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"router.grpc.port": 8000}, "router.http.port and router.grpc.port are both 8000"),
        (
            {"pools.prefill.engine.block_size": 32},
            "engine.block_size is 32 in pools.prefill and 16 in pools.decode",
        ),
        (
            {"router.timeout_s": 0.6},
            "router.timeout_s is 0.6: it must be at least twice worker.heartbeat_s (0.5)",
        ),
        ({"supervisor.backoff_max_s": 0.1}, "supervisor.backoff_max_s must be at least"),
        (
            {"pools.decode.replicas": 3, "pools.decode.expert_parallel": 2},
            "replicas is 3, expert_parallel is 2: it must divide the number of workers",
        ),
        (
            {"pools.decode.replicas": 2, "pools.decode.expert_parallel": 2, "planner.apply": True},
            "pools.decode.expert_parallel is 2: the planner can't start and end such workers",
        ),
        (
            {"pools.decode.tensor_parallel": 2, "planner.apply": True},
            "pools.decode.tensor_parallel is 2: the planner can't start and end such workers",
        ),
        (
            {
                "pools.decode.replicas": 2,
                "pools.decode.tensor_parallel": 2,
                "pools.decode.expert_parallel": 2,
            },
            "tensor_parallel is 2, expert_parallel is 2: a worker has ranks of one kind",
        ),
        ({"pools.decode.tensor_parallel": 3}, "pools.decode.tensor_parallel"),
    ],
)
def test_settings_that_do_not_fit_together(overrides: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected.replace("(", r"\(").replace(")", r"\)")):
        load_config(None, overrides)


def test_without_prefill_workers_their_settings_do_not_matter() -> None:
    load_config(None, {"pools.prefill.replicas": 0, "pools.prefill.engine.block_size": 32})
    assert load_config(None, {"router.grpc.port": 0, "router.http.port": 0}).router.http.port == 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("router: [1\n", "not valid YAML"),
        ("- 1\n", "expected settings such as"),
        ("engine: {}\nengine: {}\n", ":2: engine: written twice"),
        ("router:\n  http:\n    port: 1\n    port: 2\n", ":4: router.http.port: written twice"),
    ],
)
def test_files_that_are_no_configuration(tmp_path: Path, text: str, expected: str) -> None:
    path = write(tmp_path, text)
    (line,) = mistakes(path)
    assert line.startswith(str(path))
    assert expected in line


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    assert mistakes(tmp_path / "no.yaml") == [
        f"{tmp_path / 'no.yaml'}: can't read the configuration: No such file or directory"
    ]


def test_an_override_below_a_value(tmp_path: Path) -> None:
    path = write(tmp_path, "router: 5\n")
    assert mistakes(path, router__http__port=1) == ["router.http.port: router is the value 5, not a section"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.b=1", ("a.b", 1)),
        ("a=x=y", ("a", "x=y")),
        ("a=[1, 2]", ("a", [1, 2])),
        ("a=", ("a", None)),
        ("a=null", ("a", None)),
        ("a=true", ("a", True)),
    ],
)
def test_settings_of_the_command_line_are_yaml(text: str, expected: tuple[str, Any]) -> None:
    assert parse_setting(text) == expected


@pytest.mark.parametrize("text", ["a", "=1", "a=[1"])
def test_settings_that_can_not_be_read(text: str) -> None:
    with pytest.raises(ConfigError, match="--set"):
        parse_setting(text)


def test_secrets_are_not_shown() -> None:
    config = load_config(None, {"security.cluster_secret": "x" * 32, "redis.url": "redis://:hunter2@h:1"})
    assert "x" * 32 not in repr(config)
    assert "hunter2" not in repr(config)
    sentinels = {"redis.sentinels": ["h:1"], "redis.master": "m", "redis.sentinel_password": "hunter2"}
    assert "hunter2" not in repr(load_config(None, sentinels | {"redis.password": "hunter2"}))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"url": "redis://h:1/2"}, "redis://h:1/2"),
        ({"url": "redis://h:1", "username": "u@", "password": "p/"}, "redis://u%40:p%2F@h:1"),
        ({"url": "redis://h:1", "password_env": "HEADRACE_TEST"}, "redis://:from-env@h:1"),
        (
            {"url": "redis://h:1", "password_file": "FILE", "partitions": 4},
            "redis://:from-file@h:1?partitions=4",
        ),
        ({"url": "rediss://h:1", "ca_file": "/ca"}, "rediss://h:1?ssl_ca_certs=%2Fca"),
        (
            {"url": "rediss://h:1", "cert_file": "/c", "key_file": "/k"},
            "rediss://h:1?ssl_certfile=%2Fc&ssl_keyfile=%2Fk",
        ),
        (
            {"sentinels": ["a", "b:1"], "master": "m", "password": "p", "sentinel_password": "w", "db": 3},
            "redis+sentinel://:p@a:26379,b:1/m/3?sentinel_password=w",
        ),
        ({"nodes": ["a:1", "[::1]:2"], "tls": True}, "rediss+cluster://a:1,[::1]:2?partitions=16"),
        ({"nodes": ["a"], "partitions": 1, "username": "u"}, "redis+cluster://u:@a:6379"),
    ],
)
def test_redis_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], expected: str
) -> None:
    monkeypatch.setenv("HEADRACE_TEST", "from-env")
    (tmp_path / "secret").write_text("from-file\n")
    if "password_file" in settings:
        settings = settings | {"password_file": str(tmp_path / "secret")}
    redis = load_config(None, {f"redis.{name}": value for name, value in settings.items()}).redis
    assert not redis.embedded
    assert redis.address() == expected
    assert RedisAddress.parse(expected).text() == expected


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            {"url": "redis://h", "nodes": ["a:1"]},
            "redis.url and redis.nodes are both set: Redis is in one place",
        ),
        ({"sentinels": ["a"]}, "redis.sentinels and redis.master belong together"),
        ({"master": "m"}, "redis.sentinels and redis.master belong together"),
        ({"sentinels": ["a:b"], "master": "m"}, "'a:b' must be host:port"),
        ({"nodes": ["a/b"]}, "'a/b' must be host:port"),
        (
            {"url": "redis://h", "password": "p", "password_env": "X"},
            "redis.password and redis.password_env are both set",
        ),
        (
            {"url": "redis://u:p@h", "password": "p"},
            "redis.url holds credentials, and redis.username or a password",
        ),
        ({"password": "p"}, "redis.password is set, but the embedded Valkey takes none: set redis.url"),
        ({"partitions": 4}, "redis.partitions is set, but the embedded Valkey takes none"),
        ({"url": "redis://h", "tls": True}, "redis.tls is set, but redis.url does not begin with rediss://"),
        ({"url": "redis://h", "ca_file": "/ca"}, "need TLS: rediss:// or redis.tls"),
        ({"url": "rediss://h", "cert_file": "/c"}, "redis.cert_file and redis.key_file belong together"),
        ({"url": "redis://h", "db": 2}, "redis.db counts with redis.sentinels only"),
        ({"nodes": ["a"], "sentinel_password": "p"}, "need redis.sentinels"),
        ({"nodes": ["a"], "partitions": 0}, "redis.partitions: 0 is not allowed"),
        ({"url": "redis+sentinel://h:1"}, "needs the name of the master behind the sentinels"),
        ({"url": "redis+cluster://h:1/3"}, "a Redis Cluster has no numbered databases"),
        ({"url": "redis+cluster://h:1?ssl_ca_certs=x"}, "unknown option 'ssl_ca_certs'"),
        ({"url": "redis://h:1?partitions=0"}, "partitions is '0': must be a number from 1 to 1024"),
    ],
)
def test_redis_settings_that_do_not_go_together(settings: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError) as failure:
        load_config(None, {f"redis.{name}": value for name, value in settings.items()})
    assert expected in str(failure.value)


def test_a_password_that_is_not_there(tmp_path: Path) -> None:
    redis = load_config(None, {"redis.url": "redis://h", "redis.password_env": "HEADRACE_NOBODY"}).redis
    with pytest.raises(
        ValueError, match=r"redis\.password_env: the environment has no variable HEADRACE_NOBODY"
    ):
        redis.address()
    redis = load_config(None, {"redis.url": "redis://h", "redis.password_file": str(tmp_path / "no")}).redis
    with pytest.raises(ValueError, match=r"redis\.password_file: .*no: No such file or directory"):
        redis.address()


def test_every_setting_says_what_it_is() -> None:
    """A leaf without a description would be a bare line in the example file."""
    bare = []
    for path in setting_names(ClusterConfig):
        model: type[BaseModel] = ClusterConfig
        for part in path[:-1]:
            annotation = model.model_fields[part].annotation
            assert isinstance(annotation, type)
            model = annotation
        field = model.model_fields[path[-1]]
        leaf = not (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel))
        if leaf and not field.description and field.annotation is not bool:
            bare.append(".".join(path))
    assert bare == []
