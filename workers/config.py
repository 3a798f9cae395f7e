"""Settings of a worker. Each field is validated; unknown keys are refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, NamedTuple, Self

from pydantic import BaseModel, ByteSize, ConfigDict, Field, model_validator

from workers.protocol.messages import Compression, Road, Role

DType = Literal["auto", "float32", "bfloat16", "float16"]
Kernels = Literal["auto", "torch", "triton", "portable", "avx2", "avx512", "avx512_bf16", "amx", "amx_soft"]
KvCacheDtype = Literal["auto", "int8", "fp8"]
Graphs = Literal["auto", "none", "decode", "all"]
Quantization = Literal["auto", "none", "stored", "int8", "int4", "fp8"]


class Section(BaseModel):
    """A part of the configuration tree."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class SpeculationConfig(Section):
    """Tokens guessed ahead and verified several at a time. The output is the same without it."""

    method: Literal["none", "ngram", "draft"] = Field(
        "none", description="ngram: what followed the last tokens before; draft: a smaller model guesses"
    )
    max_tokens: int = Field(
        4, ge=1, le=16, description="guesses per request and step; fewer where it does not pay"
    )
    ngram_min: int = Field(2, ge=1, le=16, description="tokens that must match at least (ngram)")
    ngram_max: int = Field(
        4, ge=1, le=16, description="tokens compared at most; the longest match counts (ngram)"
    )
    draft_model: Path | None = Field(
        None, description="directory of a smaller model with the same vocabulary (draft)"
    )

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.ngram_min > self.ngram_max:
            raise ValueError(f"ngram_min ({self.ngram_min}) is above ngram_max ({self.ngram_max})")
        if (self.method == "draft") != (self.draft_model is not None):
            raise ValueError("method draft and draft_model go together: set both or neither")
        return self


class Batch(NamedTuple):
    """The bounds of a step."""

    num_seqs: int
    num_tokens: int


# A GPU needs about a thousand tokens before its matrix units and not its memory bound a step; many more would only hold
# up the streams that decode beside them.
_BATCHES = {"cpu": Batch(64, 512), "cuda": Batch(256, 2048)}


class EngineConfig(Section):
    """One model replica: memory, batch and precision."""

    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: cuda where there is a GPU")
    dtype: DType = Field("auto", description="of weights and KV cache; auto: bfloat16")
    quantization: Quantization = Field(
        "auto",
        description="of the weights; auto: as GPTQ, AWQ and the like store them, floats else (GGUF too); stored: "
        "as the checkpoint has them, GGUF too; fp8 needs a GPU",
    )
    kv_cache_dtype: KvCacheDtype = Field(
        "auto",
        description="auto: as dtype; int8, fp8: half the memory of 16 bits, at some loss; fp8 needs a GPU or kernels torch",
    )
    weights_memory: Literal["mmap", "huge"] = Field(
        "mmap",
        description="of the native kernels: mmap shares one file for all workers of a host; huge copies it into "
        "huge pages of the worker's own, which are read somewhat faster",
    )
    kernels: Kernels = Field(
        "auto",
        description="auto on a CPU: the best native variant, or torch where none can be built; on a GPU: triton, or torch "
        "where it fails",
    )
    block_size: int = Field(16, ge=1, le=256, description="tokens in a KV block")
    kv_cache_memory: ByteSize | None = Field(
        None,
        gt=0,
        description="bytes for KV blocks, e.g. 2GiB; ignored with num_blocks; null: 512MiB on a CPU, on a GPU what "
        "gpu_memory_utilization leaves",
    )
    num_blocks: int | None = Field(None, ge=1, description="KV blocks, instead of kv_cache_memory")
    gpu_memory_utilization: float = Field(
        0.9,
        gt=0,
        le=1,
        description="share of a GPU's memory that a worker may have, weights and all; measured at its start",
    )
    graphs: Graphs = Field(
        "auto",
        description="steps that are launched whole, as CUDA graphs: decode, all (small steps that read prompts too) or "
        "none; auto: all where Triton's kernels compute",
    )
    max_model_len: int | None = Field(
        None, ge=1, description="tokens of prompt + output; null: the model's own"
    )
    max_num_seqs: int | None = Field(
        None, ge=1, description="requests in one step; null: 64 on a CPU, 256 on a GPU"
    )
    max_num_batched_tokens: int | None = Field(
        None,
        ge=1,
        description="tokens in one step: the prefill chunk; null: 512 on a CPU, 2048 on a GPU, or max_num_seqs if more",
    )
    max_queued_tokens: int | None = Field(
        None,
        ge=1,
        description="prompt tokens that may wait in a worker that reads them itself; more wait in the router's fair line; "
        "null: 32 times max_num_batched_tokens",
    )
    prefix_caching: bool = Field(True, description="keep blocks of finished requests for later prompts")
    host_cache_memory: ByteSize = Field(
        ByteSize(0),
        ge=0,
        description="bytes of host memory for blocks that the KV cache evicts, e.g. 4GiB; 0: none",
    )
    disk_cache_memory: ByteSize = Field(
        ByteSize(0),
        ge=0,
        description="bytes on disk for blocks that host_cache_memory evicts; they outlive the worker; 0: none",
    )
    disk_cache_dir: Path | None = Field(
        None, description="where they are, an absolute path; each worker has a directory of its name in it"
    )
    num_threads: int | None = Field(
        None, ge=1, description="CPU threads of the kernels; null: cores / workers"
    )
    cpus: list[Annotated[int, Field(ge=0)]] | None = Field(
        None, description="cores to pin the native kernels' threads to, one for each; null: no pinning"
    )
    deterministic: bool = Field(
        False,
        description="bfloat16 rounds alike with and without AMX: keeps AMX out, costs speed where it is",
    )
    speculation: SpeculationConfig = SpeculationConfig()

    @model_validator(mode="after")
    def _a_core_for_each(self) -> Self:
        if self.cpus is not None and len(self.cpus) != self.num_threads:
            raise ValueError(
                f"cpus lists {len(self.cpus)} cores, num_threads is {self.num_threads}: give one core for each thread"
            )
        return self

    @model_validator(mode="after")
    def _one_tier_below_the_other(self) -> Self:
        if self.disk_cache_memory and self.disk_cache_dir is None:
            raise ValueError("disk_cache_memory is set, disk_cache_dir is not: name a directory")
        if self.disk_cache_dir is not None and not self.disk_cache_dir.expanduser().is_absolute():
            raise ValueError(f"disk_cache_dir is {self.disk_cache_dir}: it must be an absolute path")
        if self.disk_cache_memory and not self.host_cache_memory:
            raise ValueError(
                "disk_cache_memory is set, host_cache_memory is not: blocks reach the disk through host memory"
            )
        if self.host_cache_memory and not self.prefix_caching:
            raise ValueError(
                "host_cache_memory is set, prefix_caching is off: there would be nothing to keep"
            )
        return self

    @model_validator(mode="after")
    def _a_token_for_each(self) -> Self:
        if self.max_num_batched_tokens and self.max_num_batched_tokens < (self.max_num_seqs or 0):
            raise ValueError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) must be at least max_num_seqs "
                f"({self.max_num_seqs}): every running request takes one token of each step"
            )
        return self

    def batch(self, device: str) -> Batch:
        """The bounds of a step on a device of torch's type "cpu" or "cuda"."""
        seqs, tokens = _BATCHES[device]
        return Batch(
            self.max_num_seqs or min(seqs, self.max_num_batched_tokens or tokens),
            self.max_num_batched_tokens or max(tokens, self.max_num_seqs or 0),
        )


class TransferConfig(Section):
    """The hand-over of KV blocks."""

    channels: list[Road] = Field(
        default=["nccl", "cuda_ipc", "shm", "tcp"],
        min_length=1,
        description="roads that may be used, best first; of these the first that both ends have is taken",
    )
    host: str = Field("127.0.0.1", description="address the KV listener binds")
    lease_s: float = Field(10.0, gt=0, le=300, description="seconds a ticket lives without progress")
    io_timeout_s: float = Field(5.0, gt=0, le=300, description="seconds a peer may stall inside a frame")
    tcp_streams: int = Field(2, ge=1, le=16, description="connections of a pair of workers (tcp)")
    compression: Compression = Field(
        "none",
        description="of blocks on the wire (tcp, nccl): int8 and fp8 halve the bytes of 16-bit caches, at some loss",
    )
    layer_groups: int = Field(
        1,
        ge=1,
        le=256,
        description="parts in which the layers of a prefill chunk leave while it is computed; 1: with its end",
    )
    ring_memory: ByteSize = Field(
        ByteSize(32 * 1024**2),
        gt=0,
        description="staging per pair, where a cache can't be read in place (shm from a GPU, nccl)",
    )
    max_communicators: int = Field(
        16,
        ge=1,
        description="connections of this worker that may use nccl at a time; each takes 50 to 100 MB of GPU memory",
    )


class ExpertsConfig(Section):
    """How the ranks of an expert-parallel replica work together (docs/experts.md)."""

    exchange: Literal["auto", "shm", "gloo", "nccl"] = Field(
        "auto",
        description="how tokens travel between ranks; auto: nccl on GPUs, shm within a host, else gloo",
    )
    slots: int | None = Field(
        None,
        ge=1,
        description="experts of one layer that a rank has memory for; null: so many that one rank may be lost",
    )
    staging: int = Field(
        4,
        ge=0,
        description="experts, of all layers together, that a rank may hold besides while it loads others",
    )
    source: Literal["host", "peers"] = Field(
        "host",
        description="where a rank gets an expert that it lacks: the model's files, or ranks that have it",
    )


class ExpertRankConfig(Section):
    """This worker's place in an expert-parallel group."""

    group: str = Field(min_length=1)
    rank: int = Field(ge=0)
    size: int = Field(ge=2)

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        if self.rank >= self.size:
            raise ValueError(f"rank is {self.rank}, the group has ranks 0 to {self.size - 1}")
        return self


class TensorRankConfig(Section):
    """This process's place among those that compute every step of a worker together."""

    rank: int = Field(ge=0, description="0: the worker itself; the others follow it")
    size: int = Field(ge=2)
    collectives: Literal["auto", "nccl", "gloo"] = Field(
        "auto",
        description="auto: nccl on GPUs, gloo on CPUs; gloo goes through host memory, so that ranks may share a GPU, and "
        "cannot be captured in graphs",
    )

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        if self.rank >= self.size:
            raise ValueError(f"rank is {self.rank}, there are ranks 0 to {self.size - 1}")
        return self


class WorkerConfig(Section):
    """Everything one worker process needs."""

    worker_id: str
    epoch: int
    role: Role
    model_path: Path = Field(description="directory with config.json, safetensors and tokenizer.json")
    served_name: str
    cluster: str = Field(description="name space in Redis")
    secret: str = Field(min_length=16, repr=False, description="the cluster's shared secret")
    redis_url: str | None = Field(None, repr=False, description="null: no index, no registration")
    host: str = Field("127.0.0.1", description="address the token server binds")
    port: int = Field(0, ge=0, le=65535, description="0: any free port")
    heartbeat_s: float = Field(0.5, gt=0)
    timeout_s: float = Field(
        5.0, gt=0, description="seconds without a sign of life before a peer counts as dead"
    )
    engine: EngineConfig = EngineConfig()
    transfer: TransferConfig = TransferConfig()
    experts: ExpertsConfig = ExpertsConfig()
    expert_rank: ExpertRankConfig | None = Field(None, description="null: all experts are in this worker")
    tensor_rank: TensorRankConfig | None = Field(None, description="null: this process has the whole model")

    @model_validator(mode="after")
    def _one_kind_of_ranks(self) -> Self:
        if self.expert_rank is not None and self.tensor_rank is not None:
            raise ValueError("expert_rank and tensor_rank are both set: a worker has ranks of one kind")
        return self

    @model_validator(mode="after")
    def _ranks_find_each_other(self) -> Self:
        if self.expert_rank is not None and self.redis_url is None:
            raise ValueError("expert_rank is set, redis_url is not: ranks find each other through Redis")
        return self
