"""What the libraries under torch read from the environment, once, when they are loaded: call this before torch is."""

from __future__ import annotations

import os


def limit_libraries(num_threads: int | None) -> None:
    """Threads and caches of OpenMP, oneDNN and the tokenizers in this process. None leaves the number of threads."""
    if num_threads is not None:
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
            os.environ[name] = str(num_threads)
    # Threads that spin while they wait take the cores from the other workers of the host: two workers with two
    # threads each on two cores then take fifty times as long for a step.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # oneDNN keeps compiled code for each shape it has seen, 1,024 of each kind: with prompts of all lengths that grows
    # to over half a gigabyte. 64 hold what a step needs and make no step slower.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    os.environ.setdefault("LRU_CACHE_CAPACITY", "64")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
