"""The same weights and precision through transformers' own `generate`: one at a time, and a static batch.

python -m bench.peer_transformers MODEL_DIRECTORY      prints JSON
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import textwrap
import time
from pathlib import Path
from typing import Any


def measure(model_path: Path) -> dict[str, float]:
    """Output tokens per second, the prompt's time included, as a client would see it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(os.cpu_count() or 1)
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    model: Any = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.bfloat16)
    model.eval()
    text = Path(argparse.__file__).read_text() + Path(textwrap.__file__).read_text()
    ids = tokenizer(text)["input_ids"]
    rng = random.Random(0)

    def tokens_per_s(batch: int, prompt_tokens: int, output_tokens: int) -> float:
        starts = [rng.randrange(len(ids) - prompt_tokens) for _ in range(batch)]
        prompts = torch.tensor([ids[s : s + prompt_tokens] for s in starts])
        began = time.perf_counter()
        model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=output_tokens,
            min_new_tokens=output_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        return batch * output_tokens / (time.perf_counter() - began)

    tokens_per_s(1, 16, 4)  # warm
    return {"batch 1": tokens_per_s(1, 128, 128), "batch 16": tokens_per_s(16, 576, 128)}


if __name__ == "__main__":
    print(json.dumps(measure(Path(sys.argv[1]))))
