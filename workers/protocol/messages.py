"""Every message between processes, as typed msgpack maps.

Three conversations use these types:

* tokens (router <-> worker): `Reserve`, `Prefill`, `Cancel` go out; `Ticketed`, `Accepted`, `Tokens`, ... come back;
* KV (a worker that has blocks -> one that lacks them): `KvOpen`, then `KvBlocks`, `KvFirstToken`, `KvAbort`, ...,
  answered by `KvReady` and `KvAck`;
* registry (worker -> Redis -> router): `WorkerInfo` and `IndexBatch`.

A message is a frozen struct with a short tag. Unknown fields are ignored (so that a newer peer can add one),
wrong types are refused when the frame is decoded.
"""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

PROTOCOL_VERSION = 2

Role = Literal["prefill", "decode"]
Road = Literal["nccl", "cuda_ipc", "shm", "tcp"]  # by which KV blocks travel
Compression = Literal["none", "int8", "fp8"]  # of KV blocks on the wire
FinishReason = Literal["stop", "length"]
FailureCode = Literal[
    "invalid",  # the request can never be served by this worker: a client error
    "busy",  # no room now
    "lease_expired",  # the ticket's lease ran out before commit
    "transfer_failed",  # the KV hand-over broke
    "stale_epoch",  # the message names an earlier life of this worker
    "draining",  # the worker takes nothing new
    "internal",
]


class Sampling(Struct, frozen=True, omit_defaults=True):
    """How the next token is chosen. Bounds are checked at the edge (router/http, router/grpc).

    A token is a function of (seed, position, logits) only, so a stream can be continued on any worker.
    """

    max_tokens: int  # output tokens in total, tokens of earlier placements included
    seed: int  # 0 <= seed < 2**63; the router draws one when the client gave none
    temperature: float = 1.0  # 0 is greedy
    top_k: int = 0  # 0: off
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0  # over prompt and output
    presence_penalty: float = 0.0  # over output
    frequency_penalty: float = 0.0  # over output
    logit_bias: dict[int, float] = {}
    logprobs: int | None = None  # None: none; 0: the chosen token's; n: and those of the n most likely
    stop_token_ids: tuple[int, ...] = ()
    min_tokens: int = 0
    ignore_eos: bool = False


class Work(Struct, frozen=True, omit_defaults=True):
    """One request as an engine sees it. `output` holds what earlier placements have already produced."""

    request_id: str
    prompt: list[int]
    sampling: Sampling
    output: list[int] = []
    cache_salt: str = ""  # enters the hash of block 0: tenants with different salts share no prefix
    priority: int = 0  # lower goes first


class KvLayout(Struct, frozen=True):
    """The canonical block on the wire: [layer, k|v, kv_head, token, head_dim] of one block, C order.

    In int8 and fp8 the tokens of each (layer, k|v, kv_head) are followed by their scales, float32 [block_size]
    (kernels/relayout.py): a tile, which nobody cuts.

    Latent attention has one plane in place of k and v, and one head. To whoever copies blocks that is k and v of half
    as many tokens, in the same bytes.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int  # tokens
    dtype: str  # "float32", "bfloat16", "float16", "int8", "fp8"
    model_fingerprint: str  # hex
    planes: int = 2  # keys and values; 1: latents that are both

    @property
    def quantized(self) -> bool:
        """Tiles of values and their scales. They are not compressed on the wire."""
        return self.dtype in ("int8", "fp8")

    @property
    def tile_tokens(self) -> int:
        """Tokens of one (layer, k|v, kv_head)."""
        return self.block_size * self.planes // 2

    @property
    def block_bytes(self) -> int:
        return self.num_layers * 2 * self.num_kv_heads * self.tile_bytes

    @property
    def tile_bytes(self) -> int:
        """Of one (layer, k|v, kv_head)."""
        if self.quantized:
            return self.tile_tokens * (self.head_dim + 4)
        return self.tile_tokens * self.head_dim * (4 if self.dtype == "float32" else 2)

    def wire_bytes(self, num_blocks: int, num_layers: int, num_heads: int, compression: Compression) -> int:
        """Of a piece: compressed tiles have a byte for each value and a float32 scale for each token."""
        packed = self.tile_tokens * (self.head_dim + 4)
        return (
            num_blocks * num_layers * 2 * num_heads * (self.tile_bytes if compression == "none" else packed)
        )


class KvEndpoint(Struct, frozen=True):
    """One road by which blocks can reach one rank of a worker."""

    kind: Road
    address: str  # of the control connection. shm, cuda_ipc: name of an abstract unix socket; else host:port
    host_id: str = ""  # shm, cuda_ipc: only peers on the same host can use it
    device: str = ""  # cuda_ipc, nccl: the GPU
    rank: int = 0


class WorkerInfo(Struct, frozen=True):
    """What a worker says of itself when it registers and in `Welcome`."""

    worker_id: str
    epoch: int  # ms since 1970 when the supervisor started this life; strictly growing per worker_id
    role: Role
    address: str  # host:port of the token server
    model: str  # served name
    layout: KvLayout
    hash_root: bytes  # h[-1] of the block-hash chain
    num_blocks: int
    max_model_len: int
    max_num_seqs: int
    vocab_size: int
    device: str  # and what computes on it, e.g. "cpu (avx512_bf16)"
    pid: int
    endpoints: list[KvEndpoint] = []
    ranks: int = 1  # that share the KV heads


class Ticket(Struct, frozen=True):
    """A decode worker's promise: blocks are held until the lease ends. Blocks before `first_block` it has already."""

    transfer_id: str
    worker_id: str
    epoch: int
    first_block: int  # index in the request's block table
    num_blocks: int  # of the whole prompt; blocks [first_block, num_blocks) are wanted
    lease_s: float
    layout: KvLayout  # of the whole model, however many ranks share it
    endpoints: list[KvEndpoint]
    ranks: int = 1  # the receiver's KV heads are shared out among so many


class PrefixHolder(Struct, frozen=True):
    """Somebody else who has a longer prefix of the prompt cached, as the index has it: it can be fetched from there."""

    worker_id: str
    epoch: int
    num_blocks: int  # of the prefix
    endpoints: list[KvEndpoint]
    ranks: int = 1


class TokenLogprobs(Struct, frozen=True, array_like=True):
    """Natural-log probabilities of the raw model distribution (before temperature and penalties)."""

    logprob: float  # of the chosen token
    top: list[tuple[int, float]] = []  # most likely first


class PeerStatus(Struct, frozen=True):
    """The way to one receiver."""

    road: str  # "" while it is being opened
    channels: int = 0
    sent_bytes: int = 0  # acknowledged
    bytes_per_s: float = 0.0  # while bytes were on their way; 0: not measured yet
    passed_over: list[str] = []  # better roads that were allowed, and why they were not taken


class Room(Struct, frozen=True, array_like=True):
    """What a decode worker can still take, beside all that it has taken; or what a request would need of it."""

    requests: int = 0
    blocks: int = 0  # KV blocks for known tokens
    tokens: int = 0  # of prompts that may wait to be computed there

    def covers(self, need: Room) -> bool:
        return self.requests >= need.requests and self.blocks >= need.blocks and self.tokens >= need.tokens


def prefill_pairs(tokens: int, prompt_tokens: int) -> int:
    """Pairs of each of the last `tokens` of a prompt and a position that it attends to."""
    return tokens * (2 * prompt_tokens - tokens) // 2


class Load(Struct, frozen=True):
    """What the cost function needs to know of a worker, and what `headrace status` shows."""

    running: int = 0
    waiting: int = 0
    reserved: int = 0  # tickets given and not yet committed
    sending: int = 0  # hand-overs that are open on a prefill worker
    queued_prefill_tokens: int = 0
    active_blocks: int = 0  # referenced
    cached_blocks: int = 0  # hold a hash, referenced or not
    free_blocks: int = 0  # unreferenced, cached ones included
    prefix_hit_tokens: int = 0  # since start
    prefix_query_tokens: int = 0  # since start
    prompt_tokens: int = 0  # since start
    output_tokens: int = 0  # since start
    preemptions: int = 0  # since start
    drafted_tokens: int = 0  # since start: guessed by speculation and verified
    accepted_tokens: int = 0  # since start: of these, right
    # Seconds to compute a prompt token, measured lately, attention to what is before it left out; 0: not measured yet.
    prefill_token_s: float = 0.0
    decode_step_s: float = 0.0  # seconds of a step that only decodes, measured lately; 0: not measured yet
    peers: dict[str, PeerStatus] = {}  # by worker_id: those that this worker sends blocks to
    room: Room | None = None  # None: it does not tell
    # Seconds that attention takes for a prompt token and a position before it, measured lately; 0: not told apart yet.
    prefill_pair_s: float = 0.0
    queued_prefill_pairs: int = 0  # of the queued prompt tokens and the positions that each will attend to


class Planned(Struct, frozen=True):
    """What the planner last decided, by pool. In Redis, as JSON: for people and dashboards."""

    text: str
    apply: bool  # it starts and drains workers itself
    sizes: dict[str, int]  # workers there should be
    present: dict[str, int]  # workers there are, starting ones included
    draining: dict[str, int]


# --- connection set-up (both planes) ---------------------------------------------------------------------------------


class Challenge(Struct, frozen=True, tag="chal"):
    """Server to client: prove that you hold the cluster's secret."""

    version: int
    nonce: bytes


class Hello(Struct, frozen=True, tag="hello"):
    """Client to server. `proof` answers the server's nonce, `nonce` asks the server for its own proof."""

    version: int
    peer_id: str
    proof: bytes
    nonce: bytes


class Welcome(Struct, frozen=True, tag="welcome"):
    proof: bytes
    info: WorkerInfo


class Refused(Struct, frozen=True, tag="refused"):
    reason: str


# --- tokens: router to worker ----------------------------------------------------------------------------------------


class Reserve(Struct, frozen=True, tag="rsv"):
    """Ask a decode worker to take a request.

    Answered by `Accepted` when the tokens it would have to compute are at most `local_prefill_max` (it starts at
    once), else by `Ticketed` (it waits for blocks), or by `Failed`.
    """

    work: Work
    transfer_id: str
    lease_s: float
    local_prefill_max: int  # tokens; a very large value means: no prefill worker, do it all yourself
    holder: PrefixHolder | None = None


class Prefill(Struct, frozen=True, tag="pre"):
    """Ask a prefill worker to compute the prompt, send the ticket's blocks and then the first token to D."""

    work: Work
    ticket: Ticket
    holder: PrefixHolder | None = None


class Cancel(Struct, frozen=True, tag="cancel"):
    """Idempotent. Frees blocks, lease and queue places of the request on this worker; never answered."""

    request_id: str


class Ping(Struct, frozen=True, tag="ping"):
    """Sent every heartbeat; a worker that hears none for the connection's time-out drops the router's requests."""

    at: float


class StatusRequest(Struct, frozen=True, tag="stat?"):
    query_id: int
    want_hashes: bool = False
    want_metrics: bool = False


# --- tokens: worker to router ----------------------------------------------------------------------------------------


class Ticketed(Struct, frozen=True, tag="ticket"):
    request_id: str
    ticket: Ticket


class Accepted(Struct, frozen=True, tag="accept"):
    request_id: str
    cached_tokens: int


class TokenDelta(Struct, frozen=True, array_like=True):
    """Tokens of one request from one step. `index` counts output tokens from the very first placement."""

    request_id: str
    index: int  # output index of tokens[0]
    tokens: list[int]
    logprobs: list[TokenLogprobs] = []
    finish_reason: FinishReason | None = None
    stop_token: int | None = None  # the stop token id that ended it, when it was one
    cached_tokens: int = 0  # prompt tokens that no worker had to compute


class Tokens(Struct, frozen=True, tag="tok"):
    """One frame per engine step for all requests of this connection."""

    deltas: list[TokenDelta]


class PrefillDone(Struct, frozen=True, tag="predone"):
    """P has computed the prompt and D has acknowledged every block and the first token."""

    request_id: str
    cached_tokens: int
    queue_s: float
    prefill_s: float
    transfer_s: float  # from the end of computing to the last acknowledgement
    transfer_bytes: int
    channel: str


class Failed(Struct, frozen=True, tag="fail"):
    request_id: str
    code: FailureCode
    message: str
    lacks: Room | None = None  # of "busy": what there is too little of; None: it does not tell


class Heartbeat(Struct, frozen=True, tag="beat"):
    """Sent every heartbeat on each connection, and when there is room for what was refused with `busy`."""

    load: Load


class StatusReply(Struct, frozen=True, tag="stat"):
    query_id: int
    load: Load
    referenced_blocks: int
    leases: int
    requests: int
    hashes: list[bytes] = []
    metrics: bytes = b""  # Prometheus text exposition


# --- KV: from a worker that has blocks to one that lacks them ---------------------------------------------------------


class KvWindow(Struct, frozen=True):
    """Memory of the sender that the receiver maps, read-only, and copies from.

    shm: its descriptor travels beside the frame (SCM_RIGHTS), and one of a page whose first u64 is 1 for as long as
    what has been announced stays as it is. cuda_ipc: `handle` opens it, the page is as in shm. nccl: no memory, only the
    bytes that its largest piece may have.
    """

    num_bytes: int
    strides: tuple[
        int, ...
    ] = ()  # bytes between blocks, layers, k|v, heads, tokens of a cache; empty: a ring
    num_blocks: int = 0  # of a cache
    handle: bytes = b""
    offset: int = 0  # bytes from the start of what was mapped to the first row


class KvOpen(Struct, frozen=True, tag="kvo"):
    """Sender, once after the handshake: who sends, what, and how. Nothing is sent before `KvReady` has agreed."""

    road: Road
    layout: KvLayout  # of the sender's whole model
    rank: int = 0  # whose KV heads are sent
    ranks: int = 1
    compression: Compression = "none"
    window: KvWindow | None = None  # not of tcp
    nccl_id: bytes = b""  # nccl: the unique id of the communicator to join


class KvReady(Struct, frozen=True, tag="kvy"):
    """Not ok: the connection ends. `final`: no other road would help."""

    ok: bool
    reason: str = ""
    final: bool = False


class KvBlocks(Struct, frozen=True, tag="kvb"):
    """Announces blocks [first, first + count) of a ticket: of those KV heads that both ranks have, in canonical layout.

    tcp: the bytes follow this frame. shm, cuda_ipc: they lie in the window, in the blocks `source` of a cache or at
    `offset` of a ring. nccl: both sides post the next transfer of the communicator.
    """

    transfer_id: str
    epoch: int  # of the receiver
    first: int
    count: int
    num_bytes: int  # on the wire
    first_layer: int = 0
    num_layers: int = 0  # 0: all
    source: list[int] = []
    offset: int = 0


class KvFirstToken(Struct, frozen=True, tag="kvt"):
    """Every block has been acknowledged or precedes this on the same connection; D may commit."""

    transfer_id: str
    epoch: int
    token: int
    logprobs: TokenLogprobs | None
    cached_tokens: int


class KvFetch(Struct, frozen=True, tag="kvf"):
    """Please send the blocks with these hashes to the ticket, as many as are held without a gap, then `KvPrefix`.

    Acknowledged at once; not ok when nothing will come.
    """

    transfer_id: str  # of `ticket`
    ticket: Ticket
    hashes: list[bytes]


class KvPrefix(Struct, frozen=True, tag="kvp"):
    """The answer to `KvFetch` is complete: the first `count` blocks of the ticket."""

    transfer_id: str
    epoch: int
    count: int


class KvAbort(Struct, frozen=True, tag="kvx"):
    transfer_id: str
    epoch: int
    reason: str


class KvRenew(Struct, frozen=True, tag="kvr"):
    """The requests of these tickets are alive at the sender (queued, or between chunks). Never answered."""

    epoch: int
    transfer_ids: list[str]


class KvAck(Struct, frozen=True, tag="kva"):
    """One for each `KvBlocks`, `KvFirstToken`, `KvFetch` and `KvPrefix`, in order. Not ok: send no more of the ticket."""

    transfer_id: str
    ok: bool
    reason: str = ""


# --- registry: worker to Redis to router -----------------------------------------------------------------------------


class IndexBatch(Struct, frozen=True, array_like=True):
    """Changes of one worker's prefix cache, in order: `cleared` first, then `removed`, then `stored`."""

    worker_id: str
    epoch: int
    seq: int  # 1, 2, 3, ... within an epoch
    stored: list[tuple[bytes, bytes, str]] = []  # (hash, parent hash, tier)
    removed: list[tuple[bytes, str]] = []  # (hash, tier)
    cleared: bool = False


ToWorker = Hello | Reserve | Prefill | Cancel | Ping | StatusRequest
FromWorker = (
    Challenge
    | Welcome
    | Refused
    | Ticketed
    | Accepted
    | Tokens
    | PrefillDone
    | Failed
    | Heartbeat
    | StatusReply
)
KvToReceiver = Hello | KvOpen | KvBlocks | KvFirstToken | KvFetch | KvPrefix | KvAbort | KvRenew
KvToSender = Challenge | Welcome | Refused | KvReady | KvAck
