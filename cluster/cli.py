"""The `headrace` command. What is heavy (ray, torch, httpx) is imported by the command that needs it."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console, RenderableType

app = typer.Typer(
    name="headrace",
    help="Serve large language models from a cluster with disaggregated prefill and decode.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_USAGE = 2
_FAILED = 1
_WIDE = 120  # columns of a terminal that show a worker's address, pid and epoch too
_BENCHMARKS = {
    "main": "bench.main_job",
    "engine": "bench.engine",
    "compare": "bench.compare",
    "transfer": "bench.transfer",
    "router": "bench.router",
    "serve": "bench.serve",
    "simulate": "bench.simulate",
    "experts": "bench.experts",
}
_DEFAULT_URL = "http://127.0.0.1:8000"

ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", "-c", metavar="FILE", envvar="HEADRACE_CONFIG", help="YAML file with settings."),
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="Any setting by its dotted name; may be repeated."),
]
ClusterName = Annotated[str | None, typer.Option("--cluster", metavar="NAME", help="Name of the cluster.")]
Url = Annotated[
    str | None, typer.Option("--url", help="Router to ask; otherwise that of the cluster running here.")
]
ApiKey = Annotated[str | None, typer.Option("--api-key", envvar="HEADRACE_API_KEY", help="Bearer token.")]


def main() -> None:
    app()


@contextmanager
def _told(*kinds: type[Exception], code: int = _FAILED) -> Iterator[None]:
    """Exceptions that a person can do something about end as one clear message in red."""
    try:
        yield
    except kinds as error:
        Console(stderr=True, highlight=False).print(
            f"error: {error}", style="red", markup=False, soft_wrap=True
        )
        raise typer.Exit(code) from None


def _load(config_file: Path | None, settings: list[str] | None, named: dict[str, Any]) -> Any:
    from cluster.config import ConfigError, load_config
    from cluster.config_source import parse_setting

    with _told(ConfigError, code=_USAGE):
        overrides = dict(parse_setting(text) for text in settings or [])
        overrides |= {name: value for name, value in named.items() if value is not None}
        return load_config(config_file, overrides)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"headrace {version('headrace')}")
        raise typer.Exit


@app.callback()
def headrace(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def serve(
    config_file: ConfigFile = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Default model, directory, GGUF file or hub id.")
    ] = None,
    prefill: Annotated[
        int | None, typer.Option(help="Prefill workers; 0: decode workers read prompts too.")
    ] = None,
    decode: Annotated[int | None, typer.Option(help="Decode workers.")] = None,
    host: Annotated[str | None, typer.Option(help="Address that HTTP and gRPC listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="HTTP port; 0: any free port.")] = None,
    grpc_port: Annotated[int | None, typer.Option(help="gRPC port; 0: any free port.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda.")] = None,
    cluster: ClusterName = None,
    ray_address: Annotated[
        str | None,
        typer.Option(help="Ray cluster to join: auto or host:port. Otherwise Ray is started here."),
    ] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error.")] = None,
    settings: Settings = None,
) -> None:
    """Start a cluster and keep it running until Ctrl-C or SIGTERM."""
    config = _load(
        config_file,
        settings,
        {
            "model.name": model,
            "pools.prefill.replicas": prefill,
            "pools.decode.replicas": decode,
            "router.http.host": host,
            "router.grpc.host": host,
            "router.http.port": port,
            "router.grpc.port": grpc_port,
            "engine.device": device,
            "cluster": cluster,
            "ray.address": ray_address,
            "log_level": log_level,
        },
    )
    from cluster.foreground import Foreground, ServeError
    from router.policies import open_policy

    with _told(ValueError, code=_USAGE):
        open_policy(config.router.policy)  # one's own may not be found: better told now than by each router
    with _told(ServeError):
        Foreground(config).serve()


@app.command()
def down(
    cluster: ClusterName = None,
    timeout: Annotated[float, typer.Option(min=0, help="Seconds to wait for an orderly end.")] = 30.0,
    force: Annotated[bool, typer.Option("--force", help="Kill what has not ended by then.")] = False,
) -> None:
    """Stop the cluster that runs on this machine."""
    from cluster.shutdown import DownError, take_down

    with _told(DownError):
        typer.echo(take_down(cluster, timeout, force))


@app.command()
def status(
    url: Url = None,
    cluster: ClusterName = None,
    api_key: ApiKey = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what the router says, as JSON.")] = False,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Show it again every second.")] = False,
) -> None:
    """Show workers, KV blocks and queues of a running cluster."""
    import json

    from cluster.status_view import StatusError, fetch_status, render_status

    address = _find_url(url, cluster)
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=200)  # whoever reads it next can cut it
    with _told(StatusError):
        if as_json:
            typer.echo(json.dumps(fetch_status(address, api_key), indent=2))
        elif not watch:
            console.print(render_status(fetch_status(address, api_key), address, console.width >= _WIDE))
        else:
            _watch_status(console, address, api_key)


def _watch_status(console: Console, url: str, api_key: str | None) -> None:
    from rich.live import Live
    from rich.text import Text

    from cluster.status_view import StatusError, fetch_status, render_status

    def shown() -> RenderableType:
        return render_status(fetch_status(url, api_key), url, console.width >= _WIDE)

    first = shown()
    try:
        with Live(first, console=console, auto_refresh=False) as live:
            while True:
                time.sleep(1.0)
                try:
                    live.update(shown(), refresh=True)
                except StatusError as error:  # it may come back: go on looking
                    live.update(Text(str(error), "red"), refresh=True)
    except KeyboardInterrupt:
        pass


@app.command()
def explain(
    request_id: Annotated[
        str, typer.Argument(metavar="REQUEST_ID", help="The id in an answer, or: last.")
    ] = "last",
    url: Url = None,
    cluster: ClusterName = None,
    api_key: ApiKey = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what the router says, as JSON.")] = False,
) -> None:
    """Show why a request went to its workers, what each would have cost, and what took how long."""
    import json

    from cluster.explain_view import ExplainError, fetch_explanation, render_explanation

    with _told(ExplainError):
        found = fetch_explanation(_find_url(url, cluster), request_id, api_key)
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=200)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        console.print(render_explanation(found))


@app.command()
def experts(
    url: Url = None,
    cluster: ClusterName = None,
    api_key: ApiKey = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what the router says, as JSON.")] = False,
    top: Annotated[int, typer.Option(min=0, help="How many of the hottest experts to list.")] = 12,
    png: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw a heat map there as well.")] = None,
) -> None:
    """Show which experts of a MoE model are hot, where their copies are, and what is done about it."""
    import json

    from cluster.experts_view import ExpertsError, draw_experts, fetch_experts, render_experts

    with _told(ExpertsError):
        found = fetch_experts(_find_url(url, cluster), api_key)
        if png is not None:
            draw_experts(found, png)
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=200)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        console.print(render_experts(found, top))


@app.command()
def chat(
    url: Url = None,
    cluster: ClusterName = None,
    api_key: ApiKey = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="Model, when there are several.")] = None,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    temperature: Annotated[
        float | None, typer.Option(min=0, max=2, help="0: always the likeliest token.")
    ] = None,
    top_p: Annotated[float | None, typer.Option(min=0, max=1)] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer, in tokens.")] = None,
    seed: Annotated[int | None, typer.Option(help="Makes answers repeatable.")] = None,
) -> None:
    """Talk to the model. Lines may be piped in, one question each."""
    from cluster.chat import Chat, ChatError, converse

    options = {"temperature": temperature, "top_p": top_p, "max_tokens": max_tokens, "seed": seed}
    with _told(ChatError):
        conversation = Chat(
            _find_url(url, cluster),
            model,
            system,
            api_key,
            {name: value for name, value in options.items() if value is not None},
        )
    try:
        with _told(ChatError):
            conversation.connect()
            code = converse(conversation, Console(stderr=True, highlight=False))
    except KeyboardInterrupt:
        code = 130
    finally:
        conversation.close()
    raise typer.Exit(code)


@app.command()
def config(
    config_file: ConfigFile = None,
    settings: Settings = None,
    example: Annotated[
        bool, typer.Option("--example", help="Every setting with its default and its meaning instead.")
    ] = False,
) -> None:
    """Print the settings in force, secrets masked."""
    from cluster.config_document import effective_yaml, example_yaml

    typer.echo(example_yaml() if example else effective_yaml(_load(config_file, settings, {})), nl=False)


@app.command()
def upcycle(
    source: Annotated[
        str, typer.Argument(metavar="MODEL", help="Dense model: directory, GGUF file or hub id.")
    ],
    target: Annotated[Path, typer.Argument(metavar="DIRECTORY", help="Where the new model goes.")],
    groups: Annotated[int, typer.Option(min=1, help="Complete copies of each MLP among the experts.")] = 8,
    slices: Annotated[
        int, typer.Option(min=1, help="Experts that a copy is cut into, and that a token takes.")
    ] = 2,
    noise: Annotated[
        float, typer.Option(min=0, help="Makes some groups hotter: spread of the router rows' lengths.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the permutations and the router.")] = 0,
    dtype: Annotated[str, typer.Option(help="source, float32, bfloat16 or float16.")] = "source",
) -> None:
    """Turn a dense model into a mixture of experts with the same output, to run expert parallelism on."""
    from workers.models.catalog import prepare_model
    from workers.models.errors import ModelError
    from workers.models.upcycle import Upcycling
    from workers.models.upcycle import upcycle as run

    console = Console(stderr=True, highlight=False)
    say = console.print
    with _told(ModelError):
        how = Upcycling(groups, slices, noise, seed, dtype)  # type: ignore[arg-type]  # it checks the name
        path = run(prepare_model(source, say=say).path, target, how, say)
    console.print(
        f"{path}: {how.num_experts} experts in each layer, a token takes {slices}. "
        f"headrace serve --model {path}",
        soft_wrap=True,
    )


# What follows the name is the benchmark's own, `--` included.
@app.command(context_settings={"allow_interspersed_args": False})
def bench(
    what: Annotated[str, typer.Argument(help=", ".join(_BENCHMARKS))],
    arguments: Annotated[list[str] | None, typer.Argument(help="Its own options; --help lists them.")] = None,
) -> None:
    """Measure: main (`headrace serve` as users start it), engine (no HTTP), transfer (KV blocks), compare (with others),
    serve (load for any server)."""
    if what not in _BENCHMARKS:
        _refuse(f"there is no benchmark {what!r}; there are {', '.join(_BENCHMARKS)}")
    # A process of its own, since nothing here may import the benchmarks; it takes the place of this one.
    os.execv(sys.executable, [sys.executable, "-m", _BENCHMARKS[what], *(arguments or [])])


# The options are declared where the test is, for it runs without this command too.
@app.command(
    "nccl-test",
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
)
def nccl_test(context: typer.Context) -> None:
    """Measure the collectives between GPUs (or CPUs: --backend gloo), like NVIDIA's nccl-tests."""
    from cluster.nccl_test import main as run

    raise typer.Exit(run(context.args))


@app.command(
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
)
def plan(context: typer.Context) -> None:
    """Say how many workers a load needs to keep an SLO, and where fewer fall short."""
    from cluster.plan_view import main as run

    raise typer.Exit(run(context.args))


def _find_url(url: str | None, cluster: str | None) -> str:
    """--url, else --cluster's, else HEADRACE_URL, else that of the cluster which runs here, else the default port."""
    if url or (cluster is None and (url := os.environ.get("HEADRACE_URL"))):
        return url if "://" in url else f"http://{url}"
    from cluster.runfile import live_runs, read_run

    if cluster is not None:
        found = read_run(cluster)
        if found is None or not found[1]:
            _refuse(f"no cluster named {cluster!r} is running here; give its address with --url")
        elif not found[0].url:
            _refuse(f"cluster {cluster!r} (pid {found[0].pid}) is still starting")
        else:
            return found[0].url
    running = [run for run in live_runs() if run.url]
    if len(running) > 1:
        names = ", ".join(run.cluster for run in running)
        _refuse(f"several clusters are running here ({names}); choose one with --cluster")
    return running[0].url if running else _DEFAULT_URL


def _refuse(message: str) -> None:
    Console(stderr=True, highlight=False).print(
        f"error: {message}", style="red", markup=False, soft_wrap=True
    )
    raise typer.Exit(_FAILED)


if __name__ == "__main__":
    main()
