"""Sampling: share of the copy bandwidth, as if the logits were read once; torch with a sort of the vocabulary beside it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from bench.gpu.timing import Case, Launch
from kernels.triton.sampling import SamplingRows, sample_rows

# temperature, top_k, top_p, min_p
KINDS = {
    "greedy": (0.0, 0, 1.0, 0.0),
    "temperature": (0.8, 0, 1.0, 0.0),
    "top_p 0.9": (0.8, 0, 0.9, 0.0),
    "top_k 50, top_p 0.9": (0.8, 50, 0.9, 0.0),
    "min_p 0.05": (0.8, 0, 1.0, 0.05),
}


def cases(device: torch.device, tiny: bool) -> Iterator[Case]:
    vocab = 90 if tiny else 128256
    for rows in (1,) if tiny else (1, 64, 256):
        # About as steep as a model's: a few tokens hold most of the probability.
        logits = torch.randn(rows, vocab, device=device) * 2.5
        for kind, (temperature, top_k, top_p, min_p) in KINDS.items():
            params = SamplingRows.of(
                [temperature] * rows,
                [top_k] * rows,
                [top_p] * rows,
                [min_p] * rows,
                list(range(rows)),
                [7] * rows,
                device,
            )
            forms = {"headrace": _headrace(logits, params)}
            if temperature and not min_p:
                forms["torch, sorted"] = _sorted(logits, temperature, top_k, top_p)
            yield Case("sampling", {"rows": rows, "vocab": vocab, "kind": kind}, forms, logits.nbytes)


def _headrace(logits: Tensor, params: SamplingRows) -> Launch:
    return lambda: sample_rows(logits, params)


def _sorted(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Launch:
    """The usual way; its tokens are others, since it draws other noise."""

    def draw() -> Tensor:
        z = logits / temperature
        if not top_k and top_p >= 1.0:
            return torch.multinomial(z.softmax(-1), 1)
        z, ids = z.sort(-1, descending=True)
        if top_k:
            z[:, top_k:] = -torch.inf
        probs = z.softmax(-1)
        probs[probs.cumsum(-1) - probs >= top_p] = 0.0
        return ids.gather(1, torch.multinomial(probs, 1))

    return draw
