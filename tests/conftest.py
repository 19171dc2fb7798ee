"""What tests share: tiny random models of every family, a saved one with its tokenizer, an empty home, the folder of real text.

Test modules cannot import each other (import mode importlib), so everything here is a fixture. torch is imported inside
the fixtures only: tests of the torch-free side stay fast.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bitpress.engine.home import models_dir

if not shutil.which("nvidia-smi"):  # read once, when Triton is first imported, by whichever module that happens to be
    os.environ.setdefault("TRITON_INTERPRET", "1")
INSTALLED = models_dir()  # of the home that the session began with; tests have homes of their own
VOCAB, HIDDEN, FFN, HEADS, KV_HEADS, BLOCKS, CONTEXT = 320, 64, 128, 4, 2, 3, 128

LLAMA_LIKE = {
    "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": FFN, "num_hidden_layers": BLOCKS, "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS, "max_position_embeddings": CONTEXT, "initializer_range": 0.1, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1,
}  # fmt: skip
HEAD_DIM = {"head_dim": HIDDEN // HEADS}
WHOLE_HEADS = {key: value for key, value in LLAMA_LIKE.items() if key != "num_key_value_heads"}
GPT2 = {"vocab_size": VOCAB, "n_embd": HIDDEN, "n_inner": FFN, "n_layer": BLOCKS, "n_head": HEADS, "n_positions": CONTEXT}
OPT = {**WHOLE_HEADS, "ffn_dim": FFN, "word_embed_proj_dim": HIDDEN, "init_std": 0.1}

# architecture -> (configuration class of transformers, its values)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {**LLAMA_LIKE, "tie_word_embeddings": True}),
    "llama_untied": ("LlamaConfig", {**LLAMA_LIKE, "tie_word_embeddings": False}),
    "mistral": ("MistralConfig", {**LLAMA_LIKE, **HEAD_DIM, "sliding_window": None}),
    "qwen2": ("Qwen2Config", {**LLAMA_LIKE, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {**LLAMA_LIKE, **HEAD_DIM}),
    "gemma": ("GemmaConfig", {**LLAMA_LIKE, **HEAD_DIM}),
    "gemma2": ("Gemma2Config", {**LLAMA_LIKE, **HEAD_DIM, "sliding_window": 32}),
    "gemma3": ("Gemma3TextConfig", {**LLAMA_LIKE, **HEAD_DIM, "sliding_window": 32}),
    "gpt2": ("GPT2Config", {**GPT2, "initializer_range": 0.1, "bos_token_id": 0, "eos_token_id": 1}),
    "opt": ("OPTConfig", OPT),
    "gpt_neox": ("GPTNeoXConfig", WHOLE_HEADS),
    "phi": ("PhiConfig", LLAMA_LIKE),
    "phi3": ("Phi3Config", LLAMA_LIKE),
}
ARCHITECTURES = (*FAMILIES, "custom")

STORY = (
    "Once upon a time there was a little bear who lived in a small house near the river. Every morning the bear went out to look for berries. "
    "One day the bear met a girl named Lily. Lily was sad because she had lost her red ball. The bear said that he would help her to find it. "
    "They looked under the big tree, behind the old stone and in the tall grass. At last they saw the ball in the water, and the bear swam to get it. "
)


def _custom_model(seed: int) -> Any:
    """A causal language model that transformers does not know: embedding, mixing blocks of nn.Linear, head."""
    import torch
    from torch import nn
    from transformers import PretrainedConfig
    from transformers.modeling_outputs import CausalLMOutput

    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(HIDDEN)
            self.inward, self.outward = nn.Linear(HIDDEN, FFN, bias=False), nn.Linear(FFN, HIDDEN, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            steps = torch.arange(1, x.shape[1] + 1, device=x.device, dtype=x.dtype)[:, None]
            past = self.norm(x).cumsum(dim=1) / steps  # the only mixing of positions, and it looks back only
            return x + self.outward(torch.relu(self.inward(past)))

    class Custom(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = PretrainedConfig(vocab_size=VOCAB, hidden_size=HIDDEN, num_hidden_layers=BLOCKS, max_position_embeddings=CONTEXT)
            self.tokens = nn.Embedding(VOCAB, HIDDEN)
            self.stack = nn.ModuleList(Mixer() for _ in range(BLOCKS))
            self.readout = nn.Linear(HIDDEN, VOCAB, bias=False)

        def forward(self, input_ids: torch.Tensor, **_: Any) -> CausalLMOutput:
            x = self.tokens(input_ids)
            for block in self.stack:
                x = block(x)
            return CausalLMOutput(logits=self.readout(x))

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Custom().eval()


def build_tiny(architecture: str, seed: int = 0, **changes: Any) -> Any:
    """A random float32 model of one family: 3 blocks of width 64, vocabulary 320, context 128. `changes` go to its configuration."""
    import torch
    import transformers

    if architecture == "custom":
        return _custom_model(seed)
    config_class, values = FAMILIES[architecture]
    config = getattr(transformers, config_class)(**{**values, **changes})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


@pytest.fixture(scope="session")
def tiny_models() -> Callable[..., Any]:
    """`tiny_models("llama", seed=0, **config changes)` -> a new float32 model; the families are the keys of FAMILIES, and "custom"."""
    return build_tiny


@pytest.fixture(params=ARCHITECTURES)
def any_tiny(request: pytest.FixtureRequest) -> tuple[str, Any]:
    """(architecture, model), once for every family."""
    return request.param, build_tiny(request.param)


@pytest.fixture(scope="session")
def story() -> str:
    """A page of plain English that the tiny tokenizer was trained on."""
    return STORY


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Any:
    """A byte-level BPE of at most 320 tokens that puts no BOS; 0 is <bos>, 1 is <eos>."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator([STORY], trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=["<bos>", "<eos>"], initial_alphabet=alphabet))
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<bos>", eos_token="<eos>", model_max_length=CONTEXT)


@pytest.fixture(scope="session")
def tiny_llama_dir(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Path:
    """A tied tiny Llama in bfloat16 safetensors with its tokenizer. Shared by the session: copy it before changing it."""
    import torch

    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    build_tiny("llama").to(torch.bfloat16).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def smollm2_dir() -> Path:
    """SmolLM2-135M's folder where it is installed already; skips where it is not. No test downloads it for this."""
    folder = INSTALLED / "smollm2-135m"
    if not (folder / "source.json").is_file():
        pytest.skip(f"smollm2-135m is not installed in {INSTALLED}")
    return folder


@pytest.fixture(scope="session")
def built_kernels() -> Path:
    """Where compiled kernels are kept from session to session: building them takes longer than most tests, and every worker of a new home would."""
    folder = INSTALLED.parent / "kernels"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture
def bitpress_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, built_kernels: Path) -> Path:
    """A BITPRESS_HOME of this test alone, empty but for the compiled kernels that all share."""
    folder = tmp_path / "home"
    folder.mkdir()
    (folder / "kernels").symlink_to(built_kernels, target_is_directory=True)
    monkeypatch.setenv("BITPRESS_HOME", str(folder))
    return folder


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of real text and tasks that BITPRESS_TEST_DATA names; skips where it is absent."""
    folder = os.environ.get("BITPRESS_TEST_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("BITPRESS_TEST_DATA names no folder of test data")
    return Path(folder)
