"""Names of the keys in Redis. The braces keep one cluster's keys in one slot of a Redis Cluster."""

from __future__ import annotations


def workers(cluster: str) -> str:
    """HASH: worker_id -> msgpack WorkerInfo of its present life."""
    return f"{{headrace:{cluster}}}:workers"


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
