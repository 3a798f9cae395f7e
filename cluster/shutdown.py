"""`headrace down`: stop a cluster that runs in another terminal."""

from __future__ import annotations

import os
import signal
import time

from cluster.runfile import Run, live_runs, read_run, run_dir


class DownError(Exception):
    """It could not be stopped."""


def take_down(cluster: str | None, timeout_s: float, force: bool) -> str:
    """Ask the serving process to stop and wait for its end. Answers what was done. Raises DownError.

    A process is known by the lock it holds on its run file, so a reused process id is never signalled.
    """
    if cluster is None:
        running = list(live_runs())
        if not running:
            return "no cluster is running here"
        if len(running) > 1:
            names = ", ".join(run.cluster for run in running)
            raise DownError(f"several clusters are running here ({names}); choose one with --cluster")
        cluster = running[0].cluster
    found = read_run(cluster)
    if found is None:
        return f"no cluster named {cluster!r} is running here"
    run, alive = found
    if not alive:
        return _sweep(run)
    began = time.monotonic()
    _signal(run, signal.SIGTERM)
    if _gone(cluster, timeout_s):
        return f"stopped cluster {cluster!r} (pid {run.pid}) in {time.monotonic() - began:.1f} s"
    if not force:
        raise DownError(
            f"cluster {cluster!r} (pid {run.pid}) has not ended within {timeout_s:g} s; `--force` kills it"
        )
    _signal(run, signal.SIGKILL)  # its Ray and Valkey die with it
    if not _gone(cluster, 10.0):
        raise DownError(f"pid {run.pid} can't be killed")
    _sweep(run)
    return f"killed cluster {cluster!r} (pid {run.pid})"


def _signal(run: Run, number: signal.Signals) -> None:
    try:
        os.kill(run.pid, number)
    except ProcessLookupError:
        pass
    except PermissionError as error:
        raise DownError(f"cluster {run.cluster!r} (pid {run.pid}) belongs to another user") from error


def _gone(cluster: str, timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while True:
        found = read_run(cluster)
        if found is None or not found[1]:
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)


def _sweep(run: Run) -> str:
    from cluster.foreground import remove_temp_dirs

    removed = remove_temp_dirs(run)
    (run_dir() / f"{run.cluster}.json").unlink(missing_ok=True)
    extra = f"; removed {', '.join(removed)}" if removed else ""
    return f"cluster {run.cluster!r} (pid {run.pid}) had ended without tidying up{extra}"
