"""The cluster that is simulated when nothing else is asked for: Llama 2 70B on eight H100 a worker.

The cost is what `perf_table.read_table` makes of Splitwise's perf_model.csv (Patel et al., ISCA'24; MIT), rounded; a
test holds the two together where the file is there. KV cache: 90% of 640 GB less 140 GB of weights, at 320 KiB a token.
"""

from __future__ import annotations

from bench.simulate.cost import StepCost

KV_TOKENS = 1_331_200

H100_LLAMA2_70B = StepCost(
    prompt=(
        (512.0, 0.05818),
        (1024.0, 0.07696),
        (2048.0, 0.1332),
        (4096.0, 0.3756),
        (8192.0, 0.8083),
        (16384.0, 1.547),
        (32768.0, 2.927),
    ),
    pair_s=1.129e-9,
    decode_base_s=0.02989,
    sequence_s=1.993e-4,
    context_s=1.785e-7,
    kv_token_bytes=327680.0,
    source="llama2-70b, h100-80gb, tensor parallel 8 (perf_model.csv, rounded)",
)
