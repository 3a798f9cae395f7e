"""Imports run down the house only: kernels <- workers <- router <- cluster. What is pure stays pure."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("kernels", "workers", "router", "cluster", "bench", "compress", "tests")

# What a room may import of ours besides itself; a name stands for the module and everything below it.
ALLOWED: dict[str, tuple[str, ...]] = {
    "kernels": (),
    "workers": ("kernels",),
    "router": ("workers.protocol", "workers.config"),
    "cluster": ("kernels", "workers", "router"),
}
HEAVY = {"torch", "ray", "redis", "numpy", "transformers", "cupy"}
PURE = (
    "workers/engine/scheduler.py",
    "workers/engine/plan.py",
    "workers/engine/block_pool.py",
    "workers/engine/pace.py",
    "workers/engine/fill.py",
    "workers/engine/pending.py",
    "workers/gpu/buckets.py",
    "workers/prefix_loader.py",
    "workers/tiers/block_file.py",
    "workers/tiers/chain_lru.py",
    "workers/tiers/changes.py",
    "workers/models/config_values.py",
    "workers/models/mla_spec.py",
    "workers/models/moe_spec.py",
    "workers/models/rope_spec.py",
    "workers/models/sharding.py",
    "workers/models/spec.py",
    "workers/parallel/shard.py",
    "workers/protocol/experts.py",
    "workers/experts/remaining.py",
    "workers/experts/switching.py",
    "router/experts/topology.py",
    "router/prefix_index.py",
    "router/index/block_table.py",
    "router/index/holder_sets.py",
    "router/policy.py",
    "router/policies/__init__.py",
    "router/roster.py",
    "router/load.py",
    "router/room.py",
    "router/admission/line.py",
    "router/admission/order.py",
    "router/admission/drain.py",
    "router/admission/quota.py",
    "cluster/config.py",
    "cluster/topology.py",
    "cluster/supervisor.py",
    "cluster/planner/slo.py",
    "cluster/planner/trace.py",
    "cluster/planner/profile.py",
    "cluster/planner/workload.py",
    "cluster/planner/queueing.py",
    "cluster/planner/estimate.py",
    "cluster/planner/search.py",
    "cluster/planner/decide.py",
    "cluster/planner/observe.py",
)


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and absolute name of everything a file imports, imports inside functions included."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            for alias in node.names:
                # `from workers import config` imports workers.config
                yield node.lineno, f"{module}.{alias.name}"


def is_within(name: str, allowed: str) -> bool:
    return name == allowed or name.startswith(f"{allowed}.")


def module_file(name: str) -> Path | None:
    """The file of ours that a dotted name means; the last parts may be names inside it."""
    parts = name.split(".")
    while parts:
        base = ROOT.joinpath(*parts)
        for candidate in (base.with_suffix(".py"), base / "__init__.py"):
            if candidate.is_file():
                return candidate
        parts.pop()
    return None


def top_level_imports(path: Path) -> Iterator[str]:
    """What importing the file imports: neither inside functions nor under TYPE_CHECKING."""
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    lines = {
        inner.lineno
        for node in tree.body
        if isinstance(node, ast.Import | ast.ImportFrom | ast.Try)
        for inner in ast.walk(node)
        if isinstance(inner, ast.Import | ast.ImportFrom)
    }
    yield from (name for line, name in imports(path) if line in lines)


def reached(start: Path) -> dict[Path, tuple[str, ...]]:
    """Every file of ours that is loaded with `start`, and what each of them imports."""
    found: dict[Path, tuple[str, ...]] = {}
    waiting = [start]
    while waiting:
        path = waiting.pop()
        if path in found:
            continue
        found[path] = tuple(top_level_imports(path))
        for name in found[path]:
            if name.split(".")[0] in ROOMS and (file := module_file(name)) is not None:
                waiting.append(file)
    return found


@pytest.mark.parametrize("room", sorted(ALLOWED))
def test_a_room_imports_only_what_is_below_it(room: str) -> None:
    wrong = []
    for path in sorted((ROOT / room).rglob("*.py")):
        for line, name in imports(path):
            top = name.split(".")[0]
            if top not in ROOMS or top == room:
                continue
            if not any(is_within(name, allowed) for allowed in ALLOWED[room]):
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("file", PURE)
def test_what_is_pure_loads_nothing_heavy(file: str) -> None:
    start = ROOT / file
    if not start.is_file():
        pytest.fail(f"{file} is named here as pure, but does not exist")
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path, names in reached(start).items()
        for name in names
        if name.split(".")[0] in HEAVY
    ]
    assert not wrong, "\n".join(wrong)


def test_kernels_has_no_init() -> None:
    """transformers would import it as Hugging Face's package `kernels`."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_the_rule_sees_through_every_form_of_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    package = tmp_path / "workers" / "engine"
    package.mkdir(parents=True)
    file = package / "x.py"
    file.write_text(
        "import cluster.cli as c\nfrom router import policy\nfrom ..protocol import frames\n"
        "def f():\n    from cluster.config import load_config\n"
    )
    assert [name for _, name in imports(file)] == [
        "cluster.cli",
        "router.policy",
        "workers.protocol.frames",
        "cluster.config.load_config",
    ]
    assert list(top_level_imports(file)) == ["cluster.cli", "router.policy", "workers.protocol.frames"]
