"""Tensor-parallel ranks read their parts of a model: put together they are the whole, and no rank reads the rest."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.workers.models.test_stored_forms import CASES, write
from workers.models import weight_source
from workers.models.checkpoint import read_json
from workers.models.errors import ModelError
from workers.models.layer_weights import GroupedAttention, LatentAttention, Mlp, SparseMlp
from workers.models.matrix_form import to_float
from workers.models.random_model import write_random_model
from workers.models.scheme import Scheme
from workers.models.sharding import check_shardable, sharded
from workers.models.spec import DecoderSpec
from workers.models.weight_source import WeightSource
from workers.parallel.shard import WHOLE, Shard

SPLIT = ["llama", "qwen2", "qwen3_moe", "qwen2_moe", "mixtral", "deepseek_v2", "deepseek_v3", "gpt_oss"]


def spec_of(path: Path) -> DecoderSpec:
    return DecoderSpec.from_config(read_json(path / "config.json"))


def model(path: Path, family: str, **config: Any) -> Path:
    return write_random_model(path, {"model_type": family, "vocab_size": 257, **config}, seed=5)


def rows(parts: list[Tensor], sizes: list[list[int]]) -> Tensor:
    """Matrices that hold several things below each other, `sizes` of each rank, joined thing by thing."""
    split = [torch.split(part, size) for part, size in zip(parts, sizes, strict=True)]
    return torch.cat([torch.cat(things) for things in zip(*split, strict=True)])


def same(parts: list[Any], whole: Any, dim: int) -> bool:
    return torch.equal(torch.cat([to_float(part) for part in parts], dim), to_float(whole))


def halves(parts: list[Any], whole: Any) -> bool:
    given = [to_float(part) for part in parts]
    return torch.equal(rows(given, [[len(one) // 2] * 2 for one in given]), to_float(whole))


def check_mlp(parts: list[Mlp[Any]], whole: Mlp[Any]) -> None:
    assert halves([part.gate_up for part in parts], whole.gate_up)
    assert same([part.down for part in parts], whole.down, 1)
    if whole.gate_up_bias is not None:
        assert halves([part.gate_up_bias for part in parts], whole.gate_up_bias)
    if whole.down_bias is not None:
        biases = [part.down_bias for part in parts if part.down_bias is not None]
        assert torch.equal(torch.stack(biases).sum(0), whole.down_bias)


def check_attention(parts: list[Any], whole: Any, spec: DecoderSpec, size: int) -> None:
    assert same([part.output for part in parts], whole.output, 1)
    if isinstance(whole, LatentAttention):
        assert same([part.kv_up for part in parts], whole.kv_up, 0)
        assert all(torch.equal(part.kv_norm, whole.kv_norm) for part in parts)
        if whole.q_up is not None:
            assert same([part.q_up for part in parts], whole.q_up, 0)
            assert all(torch.equal(part.down, whole.down) for part in parts)
        return
    assert isinstance(whole, GroupedAttention)
    local = [sharded(spec, Shard(rank, size)) for rank in range(size)]
    sizes = [[one.num_heads * spec.head_dim, *[one.num_kv_heads * spec.head_dim] * 2] for one in local]
    assert torch.equal(rows([part.qkv for part in parts], sizes), whole.qkv)
    if whole.qkv_bias is not None:
        assert torch.equal(rows([part.qkv_bias for part in parts], sizes), whole.qkv_bias)
    if whole.sinks is not None:
        assert same([part.sinks for part in parts], whole.sinks, 0)
    if whole.output_bias is not None:  # it is added once
        assert [part.output_bias is None for part in parts] == [False] + [True] * (size - 1)


@pytest.mark.parametrize("family", SPLIT)
def test_the_parts_of_all_ranks_are_the_whole_model(tmp_path: Path, family: str) -> None:
    heads = {} if family.startswith("deepseek") else {"num_attention_heads": 4, "num_key_value_heads": 2}
    path, size = model(tmp_path, family, **heads), 2
    spec = spec_of(path)
    whole = WeightSource(path, spec)
    sources = [WeightSource(path, spec, shard=Shard(rank, size)) for rank in range(size)]
    assert same([source.head() for source in sources], whole.head(), 0)
    if not spec.tied_embeddings:
        assert same([source.embedding() for source in sources], whole.embedding(), 0)
    for index, (layer, *parts) in enumerate(
        zip(whole.layers(), *(source.layers() for source in sources), strict=True)
    ):
        check_attention([part.attention for part in parts], layer.attention, spec, size)
        if not isinstance(layer.mlp, SparseMlp):
            check_mlp([part.mlp for part in parts], layer.mlp)
            continue
        assert all(torch.equal(part.mlp.router, layer.mlp.router) for part in parts)
        check_mlp([source.expert(index, 3) for source in sources], whole.expert(index, 3))
        if layer.mlp.shared is not None:
            check_mlp([part.mlp.shared for part in parts], layer.mlp.shared)


def test_more_ranks_than_kv_heads_have_the_same_ones(tmp_path: Path) -> None:
    path = model(tmp_path, "llama", num_attention_heads=4, num_key_value_heads=2)
    spec, dim = spec_of(path), spec_of(path).head_dim
    attention = [
        next(iter(WeightSource(path, spec, shard=Shard(rank, 4)).layers())).attention for rank in range(4)
    ]
    whole = next(iter(WeightSource(path, spec).layers())).attention
    for rank, part in enumerate(attention):
        q, k, v = torch.split(part.qkv, dim)
        heads = whole.qkv.view(8, dim, -1)
        assert torch.equal(q, heads[rank])
        assert torch.equal(k, heads[4 + rank // 2])
        assert torch.equal(v, heads[6 + rank // 2])


def test_quantized_parts_have_the_values_of_the_whole(tmp_path: Path) -> None:
    """Groups of 32 inputs stay whole where a rank's inputs are a multiple of them."""
    path = model(tmp_path, "llama", intermediate_size=128, num_attention_heads=4, num_key_value_heads=2)
    spec = spec_of(path)
    whole = next(iter(WeightSource(path, spec, Scheme("int4")).layers())).mlp
    parts = [
        next(iter(WeightSource(path, spec, Scheme("int4"), Shard(rank, 2)).layers())).mlp for rank in range(2)
    ]
    check_mlp(parts, whole)


@pytest.mark.parametrize(
    "case", ["gptq 8 bits", "awq g64", "compressed int8 channel", "compressed g32 asymmetric"]
)
@pytest.mark.parametrize("neurons", [256, 192], ids=["whole groups", "groups that ranks share"])
def test_parts_of_stored_integers_have_the_values_of_the_whole(
    tmp_path: Path, case: str, neurons: int
) -> None:
    """192 neurons on four ranks: 48 each, one and a half groups of 32."""
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    write(tmp_path, CASES[case], {"intermediate_size": neurons, **heads})
    spec = spec_of(tmp_path)
    whole = next(iter(WeightSource(tmp_path, spec, Scheme("none")).layers()))
    sources = [WeightSource(tmp_path, spec, Scheme("none"), Shard(rank, 4)) for rank in range(4)]
    parts = [next(iter(source.layers())) for source in sources]
    check_mlp([part.mlp for part in parts], whole.mlp)
    assert same([part.attention.output for part in parts], whole.attention.output, 1)


def test_a_rank_reads_no_more_than_its_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = model(tmp_path, "llama", num_attention_heads=8, num_key_value_heads=4, intermediate_size=256)
    spec, read = spec_of(path), [0]

    def counted(self: WeightSource, name: str, reader: Any) -> Tensor:
        tensor = original(self, name, reader)
        read[0] += tensor.numel()
        return tensor

    original = WeightSource._read
    monkeypatch.setattr(weight_source.WeightSource, "_read", counted)

    def elements(shard: Shard) -> int:
        read[0] = 0
        source = WeightSource(path, spec, shard=shard)
        source.embedding(), source.head(), source.final_norm(), list(source.layers())
        return read[0]

    norms = (2 * spec.num_layers + 1) * spec.hidden_size
    whole, each = elements(WHOLE) - norms, [elements(Shard(rank, 4)) - norms for rank in range(4)]
    assert sum(each) == whole
    assert max(each) <= whole / 4 + 2 * spec.hidden_size  # of 257 rows of vocabulary one rank has two more


def test_what_cannot_be_shared_out_is_said(tmp_path: Path) -> None:
    spec = spec_of(model(tmp_path, "llama", num_attention_heads=4, num_key_value_heads=2))
    check_shardable(spec, 4)
    with pytest.raises(ModelError, match="4 query heads cannot be shared out evenly among 8"):
        check_shardable(spec, 8)
    with pytest.raises(ModelError, match=r"9 query heads .* among 2"):
        check_shardable(replace(spec, num_heads=9, num_kv_heads=3), 2)
    with pytest.raises(ModelError, match="3 KV heads cannot"):
        check_shardable(replace(spec, num_heads=12, num_kv_heads=3), 2)
    with pytest.raises(ModelError, match=r"130 neurons of an MLP \(intermediate_size\)"):
        check_shardable(replace(spec, intermediate_size=130), 4)
    with pytest.raises(ModelError, match="norms the queries of all heads together"):
        check_shardable(replace(spec, qk_norm_whole=True), 2)


def test_a_rank_is_one_of_the_ranks() -> None:
    with pytest.raises(ValueError, match="rank 2 of 2"):
        Shard(2, 2)


def test_rows_that_do_not_come_out_even_are_all_had_once() -> None:
    for count in (1, 7, 257, 1024):
        parts = [Shard(rank, 4).rows_of(count) for rank in range(4)]
        assert [row for part in parts for row in part] == list(range(count))
        assert max(map(len, parts)) <= Shard(0, 4).rows_each(count)
