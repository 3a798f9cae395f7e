"""The folder `kernels/` shares its name with a Hugging Face package that transformers looks for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_kernels_is_a_namespace_package() -> None:
    # With an __init__.py, `import transformers` would run our package in the place of Hugging Face's `kernels`.
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_transformers_works_from_the_checkout() -> None:
    code = (
        "import transformers, kernels.reference\n"
        "from transformers.utils import is_kernels_available\n"
        "assert not is_kernels_available(), 'our kernels/ was taken for the Hugging Face package'\n"
        "transformers.LlamaForCausalLM(transformers.LlamaConfig(hidden_size=8, intermediate_size=8,"
        " num_hidden_layers=1, num_attention_heads=1, vocab_size=8))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
