"""The speculation that the configuration asks for, or none."""

from __future__ import annotations

import dataclasses

from workers.config import EngineConfig, SpeculationConfig
from workers.engine.backend import open_backend
from workers.engine.draft import DraftProposer
from workers.engine.ngram import NgramProposer
from workers.engine.speculation import Speculation
from workers.models.catalog import PreparedModel, prepare_model


def open_speculation(
    config: EngineConfig, model: PreparedModel, num_blocks: int, step_tokens: int
) -> Speculation | None:
    """`num_blocks`: of the engine's KV cache; `step_tokens`: the most of its steps.

    Raises ModelError, and ValueError for a draft model that cannot guess.
    """
    chosen = config.speculation
    if chosen.method == "none":
        return None
    if chosen.method == "ngram":
        return Speculation(NgramProposer(chosen.ngram_min, chosen.ngram_max), chosen.max_tokens)
    return Speculation(_draft_proposer(config, chosen, model, num_blocks, step_tokens), chosen.max_tokens)


def _draft_proposer(
    config: EngineConfig, chosen: SpeculationConfig, model: PreparedModel, num_blocks: int, step_tokens: int
) -> DraftProposer:
    draft = prepare_model(str(chosen.draft_model))
    if draft.vocab_size != model.vocab_size:
        raise ValueError(
            f"engine.speculation.draft_model {chosen.draft_model} has {draft.vocab_size} tokens, the model has "
            f"{model.vocab_size}: they must share one vocabulary"
        )
    # The request's sampling is the model's, and so is what ends a text.
    backend = open_backend(config, dataclasses.replace(draft, eos_token_ids=model.eos_token_ids))
    return DraftProposer(
        backend.runner(num_blocks),
        block_size=config.block_size,
        num_blocks=num_blocks,
        max_model_len=draft.max_model_len,
        max_step_tokens=step_tokens,
    )
