"""Shapes of the output layers of real models, which a benchmark takes by name.

Sizes are those of each model's published config.json on the Hugging Face Hub (`hidden_size`, `vocab_size`,
`final_logit_softcapping`), named in `source`. Each was compared with a copy in another public repository, named in
`checked`. `vocab_size` is the number of rows of the output layer, which may be more than the tokenizer has entries.
"""

# T = tokens in one call, V = vocabulary, H = hidden

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Workload:
    """The output layer of one model, and the count of tokens in one call.

    Attributes:
        name: as on the command line.
        tokens: T of one call.
        vocab: V.
        hidden: H.
        softcap: c in `c * tanh(logits / c)`; 0 is off.
        source: repository on the Hugging Face Hub whose config.json states the sizes.
        checked: another place that states them, as owner/repository@commit:path on GitHub.
    """

    name: str
    tokens: int
    vocab: int
    hidden: int
    softcap: float
    source: str
    checked: str = ""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(T, V, H)."""
        return self.tokens, self.vocab, self.hidden


# One sequence of 8,192 tokens: the length these models are commonly trained and fine-tuned with.
_TOKENS = 8192

_MAXTEXT = "AI-Hypercomputer/maxtext@48445cf:src/MaxText/configs/models"
# MaxText rounds the vocabulary of Gemma 2 up to 256,128; LitGPT has it as published, the same sizes and cap otherwise.
_LITGPT = "Lightning-AI/litgpt@0006c97:litgpt/config.py"
# 262,144 entries, to which the conversion adds 64 rows for image tokens.
_GEMMA3 = "huggingface/transformers@0d7e95d:src/transformers/models/gemma3/convert_gemma3_weights.py"

WORKLOADS = {
    w.name: w
    for w in (
        Workload("llama-3-8b", _TOKENS, 128_256, 4096, 0.0, "meta-llama/Meta-Llama-3-8B", f"{_MAXTEXT}/llama3-8b.yml"),
        Workload("qwen3-8b", _TOKENS, 151_936, 4096, 0.0, "Qwen/Qwen3-8B", f"{_MAXTEXT}/qwen3-8b.yml"),
        Workload("gemma-2-2b", _TOKENS, 256_000, 2304, 30.0, "google/gemma-2-2b", _LITGPT),
        Workload("gemma-2-9b", _TOKENS, 256_000, 3584, 30.0, "google/gemma-2-9b", _LITGPT),
        Workload("gemma-3-4b", _TOKENS, 262_208, 2560, 0.0, "google/gemma-3-4b-pt", _GEMMA3),
        Workload("gpt-oss-20b", _TOKENS, 201_088, 2880, 0.0, "openai/gpt-oss-20b",
                 "AI-Hypercomputer/maxtext@6710342:src/MaxText/configs/models/gpt-oss-20b.yml"),
        Workload("deepseek-v3", _TOKENS, 129_280, 7168, 0.0, "deepseek-ai/DeepSeek-V3",
                 "AI-Hypercomputer/maxtext@1fbaa6e:src/MaxText/configs/models/deepseek3-671b.yml"),
    )
}  # fmt: skip
