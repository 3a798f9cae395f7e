"""Names of the keys in Redis.

The braces keep the keys of one partition in one hash slot, so that one script may write a worker's registration, lease,
set and number and append to the log. With one partition that is all of a cluster's keys; with more, each worker belongs
to one of them for ever, and a partition has a registry and a log of its own: they spread over a Redis Cluster's nodes.
`cluster` below is the name that `partition` gives.
"""

from __future__ import annotations

import zlib


def partition(cluster: str, worker_id: str, partitions: int) -> str:
    """The name space of a worker's keys, among those of `all_partitions`."""
    return all_partitions(cluster, partitions)[zlib.crc32(worker_id.encode()) % partitions]


def all_partitions(cluster: str, partitions: int) -> list[str]:
    return [cluster] if partitions == 1 else [f"{cluster}/{number}" for number in range(partitions)]


def workers(cluster: str) -> str:
    """HASH: worker_id -> msgpack WorkerInfo of its present life."""
    return f"{{headrace:{cluster}}}:workers"


def planner(cluster: str) -> str:
    """STRING with a time to live: JSON of what the planner last decided. `cluster` is the cluster's own name."""
    return f"{{headrace:{cluster}}}:planner"


def lease(cluster: str, worker_id: str) -> str:
    """STRING with a time to live: the epoch of the worker that is alive. Gone: the worker is dead."""
    return f"{{headrace:{cluster}}}:lease:{worker_id}"


def index_stream(cluster: str) -> str:
    """STREAM of msgpack IndexBatch (field `b`), cut to a bounded length."""
    return f"{{headrace:{cluster}}}:index:log"


def index_blocks(cluster: str, worker_id: str, epoch: int) -> str:
    """SET of what this life of the worker holds, a member for each hash and tier (protocol/tiers.py): the snapshot."""
    return f"{{headrace:{cluster}}}:index:{worker_id}:{epoch}:blocks"


def index_seq(cluster: str, worker_id: str, epoch: int) -> str:
    """STRING: sequence number of the last batch that is in the snapshot."""
    return f"{{headrace:{cluster}}}:index:{worker_id}:{epoch}:seq"


# Of expert-parallel groups; `cluster` is the cluster's own name, for all of them.


def expert_ranks(cluster: str) -> str:
    """HASH: worker_id -> msgpack ExpertRank. Who holds no lease is dead, and only has not been tidied away."""
    return f"{{headrace:{cluster}}}:experts:ranks"


def expert_members(cluster: str, group: str) -> str:
    """HASH: rank -> msgpack Member (workers/experts/messages.py) of its last life, for ranks to find each other."""
    return f"{{headrace:{cluster}}}:experts:{group}:members"


def expert_counts(cluster: str, group: str) -> str:
    """STREAM of msgpack ExpertCounts (field `c`), cut to a bounded length."""
    return f"{{headrace:{cluster}}}:experts:{group}:counts"


def expert_version(cluster: str, group: str) -> str:
    """STRING: the version that was posted last."""
    return f"{{headrace:{cluster}}}:experts:{group}:version"


def expert_post(cluster: str, group: str) -> str:
    """STRING: msgpack ExpertPost of that version."""
    return f"{{headrace:{cluster}}}:experts:{group}:post"


def expert_planner(cluster: str) -> str:
    """STRING with a time to live: the router that plans placements."""
    return f"{{headrace:{cluster}}}:experts:planner"
