"""One worker as `headrace status` shows it."""

from __future__ import annotations

from typing import Any

import msgspec

from router.fleet import Member
from router.load import LoadBook
from router.prefix_index import PrefixIndex


def describe(member: Member, book: LoadBook, index: PrefixIndex) -> dict[str, Any]:
    """`load` is the worker's last report; `booked` is this replica's own; `index_blocks` what the index knows of it."""
    info, load = member.info, member.link.load
    booked = book.booked(info.worker_id)
    queried = load.prefix_query_tokens
    return {
        "worker_id": info.worker_id,
        "role": info.role,
        "epoch": info.epoch,
        "address": info.address,
        "device": info.device,
        "pid": info.pid,
        "state": member.state,
        "reason": member.link.reason,
        "busy": member.link.busy,
        "running": load.running,
        "waiting": load.waiting,
        "reserved": load.reserved,
        "sending": load.sending,
        "peers": {worker_id: msgspec.to_builtins(peer) for worker_id, peer in load.peers.items()},
        "queued_prefill_tokens": load.queued_prefill_tokens,
        "prefill_token_s": load.prefill_token_s or None,
        "decode_step_s": load.decode_step_s or None,
        "blocks": {
            "total": info.num_blocks,
            "used": load.active_blocks,
            "cached": load.cached_blocks,
            "free": load.free_blocks,
        },
        "prefix_hit_rate": round(load.prefix_hit_tokens / queried, 4) if queried else None,
        "prompt_tokens": load.prompt_tokens,
        "output_tokens": load.output_tokens,
        "preemptions": load.preemptions,
        "booked": {
            "requests": booked.requests,
            "prefill_tokens": booked.prefill_tokens,
            "decode_blocks": booked.decode_blocks,
        },
        "recent_requests": round(book.recent_requests(info.worker_id), 3),
        "index_blocks": index.num_blocks(info.worker_id),
        "late_messages": member.link.late_messages,
    }
