"""How fast an engine says that it is: what routers weigh its queue by."""

from __future__ import annotations

from pathlib import Path

import pytest

from workers.config import EngineConfig
from workers.engine.engine import Engine
from workers.models.catalog import prepare_model
from workers.models.random_model import write_random_model
from workers.protocol.messages import Sampling


def test_steps_that_read_prompts_and_steps_that_decode_are_measured_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = prepare_model(str(write_random_model(tmp_path, "llama", seed=1)))
    engine = Engine(EngineConfig(device="cpu", dtype="float32", num_blocks=64, num_threads=1), model)
    now, overhead_s = [0.0], [0.0]
    run = engine.runner.run

    def slowly(step_input):  # 2 ms for each token of the step
        now[0] += overhead_s[0] + 0.002 * len(step_input.arrays.token_ids)
        return run(step_input)

    monkeypatch.setattr("workers.engine.engine.time.perf_counter", lambda: now[0])
    monkeypatch.setattr(engine.runner, "run", slowly)
    assert (engine.load().prefill_token_s, engine.load().decode_step_s) == (0.0, 0.0)
    engine.generate([list(range(5, 69))], Sampling(max_tokens=1, seed=1))
    assert engine.load().prefill_token_s == pytest.approx(0.002)
    assert engine.load().decode_step_s == 0.0
    overhead_s[0] = 0.064  # doubles a step of 32 tokens
    engine.generate([list(range(200, 232))], Sampling(max_tokens=1, seed=1))
    assert engine.load().prefill_token_s == pytest.approx(0.002, rel=0.1), "a short prompt says little"
    overhead_s[0] = 0.0
    engine.generate([[5, 6, 7], [8, 9, 10]], Sampling(max_tokens=30, seed=1, ignore_eos=True))
    assert engine.load().decode_step_s == pytest.approx(0.004)
