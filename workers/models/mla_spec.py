"""Multi-head latent attention (DeepSeek-V2, section 2.1), read from config.json. No torch here."""

from __future__ import annotations

from dataclasses import dataclass

from workers.models.config_values import ConfigValues


@dataclass(frozen=True)
class MlaSpec:
    """Keys and values of all heads are projections of one latent per token, which is all that the cache holds."""

    q_lora_rank: int | None  # None: queries are projected in one step
    kv_lora_rank: int
    nope_dim: int  # of a query or key head, the part without positions
    rope_dim: int  # the rotated part; of keys, shared by all heads
    value_dim: int  # of a value head
    rope_interleaved: bool  # the checkpoint's rotated pairs are neighbours, not half a head apart

    @property
    def latent_dim(self) -> int:
        """Of what is cached for a token: its latent, then its rotated key."""
        return self.kv_lora_rank + self.rope_dim

    @property
    def query_dim(self) -> int:
        return self.nope_dim + self.rope_dim


def read_mla(model_type: str, config: ConfigValues) -> MlaSpec | None:
    """None for an architecture with ordinary attention. Raises ModelError. Defaults are those of transformers."""
    if model_type not in ("deepseek_v2", "deepseek_v3"):
        return None
    config.only("attention_bias", False)
    present = "q_lora_rank" in config.values
    return MlaSpec(
        q_lora_rank=None
        if present and config.values["q_lora_rank"] is None
        else config.integer("q_lora_rank", 1536),
        kv_lora_rank=config.integer("kv_lora_rank", 512),
        nope_dim=config.integer("qk_nope_head_dim", 128),
        rope_dim=config.integer("qk_rope_head_dim", 64),
        value_dim=config.integer("v_head_dim", 128),
        rope_interleaved=model_type == "deepseek_v2" or config.flag("rope_interleave", True),
    )
