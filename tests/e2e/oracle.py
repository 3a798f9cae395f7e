"""What transformers says of the same weights: the judge of every token we serve."""

from __future__ import annotations

import argparse
import textwrap
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

_TIE = 1e-3  # logits closer than this may come out in either order when sums are taken in another order


@dataclass
class Oracle:
    """float32 logits of transformers. Greedy output is right when each token is the argmax after those before it."""

    model_path: Path
    _judged: dict[tuple[tuple[int, ...], tuple[int, ...]], str | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(self.model_path)
        self.model = AutoModelForCausalLM.from_pretrained(self.model_path, dtype=torch.float32).eval()

    @torch.inference_mode()
    def fault(self, prompt: list[int], output: list[int]) -> str | None:
        """None when `output` is transformers' greedy continuation; otherwise where it leaves it."""
        key = (tuple(prompt), tuple(output))
        if key not in self._judged:
            self._judged[key] = self._judge(prompt, output)
        return self._judged[key]

    def _judge(self, prompt: list[int], output: list[int]) -> str | None:
        logits = self.model(torch.tensor([prompt + output[:-1]]), logits_to_keep=len(output)).logits[0]
        for index, token in enumerate(output):
            best = int(logits[index].argmax())
            gap = float(logits[index, best] - logits[index, token])
            if gap > _TIE:
                return (
                    f"output token {index} of a prompt of {len(prompt)} is {token}, transformers has {best}"
                )
        return None

    @torch.inference_mode()
    def generate(self, prompt: list[int], max_tokens: int) -> list[int]:
        answer = self.model.generate(
            torch.tensor([prompt]),
            max_new_tokens=max_tokens,
            min_new_tokens=max_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        return answer[0, len(prompt) :].tolist()


LENGTHS = [1, 2, 3, 7, 15, 16, 17, 31, 32, 33, 47, 64, 65, 90, 120, 150, 180, 200, 230, 256]
LENGTHS += [300, 333, 400, 450, 512, 513, 600, 700, 850, 1000, 1250, 1500]


def real_prompts(tokenizer: object, lengths: list[int] = LENGTHS) -> list[list[int]]:
    """Text that any Python has, cut to `lengths`: every other prompt starts at the same place, so prefixes recur."""
    text = Path(argparse.__file__).read_text() + Path(textwrap.__file__).read_text()
    token_ids = tokenizer(text)["input_ids"]  # type: ignore[operator]
    starts = [0 if i % 2 else 137 * i for i in range(len(lengths))]
    return [token_ids[start : start + length] for start, length in zip(starts, lengths, strict=True)]
