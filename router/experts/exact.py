"""The exact optimum of one layer by mixed-integer programming (HiGHS through scipy), for small cases: the yardstick.

Variables: x[e, r] = 1 where rank r holds expert e; y[e, r] tokens of e served there; T, the time of the fullest rank.
Minimize T such that every expert's tokens are served by ranks that hold it, no rank holds more than its slots, and no
rank's tokens exceed speed * T. Equal shares add one variable for each number of copies that an expert may have.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from router.experts.arrays import Bools, Floats
from router.experts.topology import Topology


class Optimum(NamedTuple):
    time: float  # of the fullest rank, in the best placement found
    bound: float  # proven: no placement is below
    held: Bools  # [E, R] bool
    proven: bool


def solve(
    loads: Floats, topology: Topology, *, equal_shares: bool = False, limit_s: float = 60.0
) -> Optimum | None:
    """None where no placement was found within `limit_s` seconds. Raises ImportError without scipy."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import coo_array

    loads = np.asarray(loads, dtype=np.float64)
    topology.validate(len(loads))
    unit = float(loads.sum()) or 1.0
    share = loads / unit
    num_experts, num_ranks = len(loads), len(topology.ranks)
    size = num_experts * num_ranks
    redundant = sum(topology.slots) - num_experts
    most = min(redundant + 1, len(topology.alive)) if equal_shares else 0
    num_variables = 2 * size + 1 + num_experts * most
    last = 2 * size  # T

    rows: list[tuple[dict[int, float], float, float]] = []

    def x(expert: int, rank: int) -> int:
        return expert * num_ranks + rank

    def y(expert: int, rank: int) -> int:
        return size + x(expert, rank)

    def z(expert: int, copies: int) -> int:
        return last + 1 + expert * most + copies - 1

    for rank, (slots, speed) in enumerate(zip(topology.slots, topology.speeds, strict=True)):
        rows.append(({x(e, rank): 1.0 for e in range(num_experts)}, -np.inf, slots))
        load = {y(e, rank): 1.0 for e in range(num_experts)}
        rows.append(({**load, last: -speed / sum(topology.speeds)}, -np.inf, 0.0))
    for e in range(num_experts):
        copies = {x(e, rank): 1.0 for rank in range(num_ranks)}
        rows.append((copies, 1.0, num_ranks))
        rows.append(({y(e, rank): 1.0 for rank in range(num_ranks)}, share[e], share[e]))
        for rank in range(num_ranks):
            rows.append(({y(e, rank): 1.0, x(e, rank): -share[e]}, -np.inf, 0.0))
        if not equal_shares:
            continue
        rows.append(({z(e, n): 1.0 for n in range(1, most + 1)}, 1.0, 1.0))
        rows.append(({**copies, **{z(e, n): -float(n) for n in range(1, most + 1)}}, 0.0, 0.0))
        for rank in range(num_ranks):
            # With n copies a copy serves 1/n at most, so all serve just that.
            each = {z(e, n): -share[e] / n for n in range(1, most + 1)}
            rows.append(({y(e, rank): 1.0, **each}, -np.inf, 0.0))

    entries = [
        (row, column, value) for row, (terms, _, _) in enumerate(rows) for column, value in terms.items()
    ]
    where = np.array([entry[:2] for entry in entries]).T
    matrix = coo_array(([entry[2] for entry in entries], where), shape=(len(rows), num_variables))
    integer = np.ones(num_variables)
    integer[size : last + 1] = 0
    upper = np.ones(num_variables)
    upper[last] = np.inf
    objective = np.zeros(num_variables)
    objective[last] = 1.0
    done = milp(
        objective,
        constraints=LinearConstraint(matrix.tocsr(), [row[1] for row in rows], [row[2] for row in rows]),
        integrality=integer,
        bounds=Bounds(0, upper),
        options={"time_limit": limit_s, "mip_rel_gap": 1e-4},
    )
    if done.x is None:
        return None
    scale = unit / sum(topology.speeds)
    held = done.x[:size].reshape(num_experts, num_ranks) > 0.5
    return Optimum(done.fun * scale, (done.mip_dual_bound or 0.0) * scale, held, done.status == 0)
