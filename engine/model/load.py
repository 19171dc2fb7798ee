"""Load a causal language model from a folder of safetensors. Knows transformers' loader and every way in which it must be refused.

Pickles, remote code, damaged or incomplete weights and models that are no causal language model are refused before or
right after reading. `local.py` judges the files; what only shows once weights are read is judged here.
"""

from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

from bitpress.engine.errors import BitpressError, InputError
from bitpress.engine.model import attention, between, local
from bitpress.engine.model.anatomy import Anatomy
from bitpress.engine.model.inspect import anatomy_of
from bitpress.kernels.pages import keep_freed

STORED = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float32}
AGAIN = "Copy, download or export the model again."


@dataclass(frozen=True)
class Loaded:
    """A dense model in memory: eval mode, no gradients, weights in the type they are stored in."""

    model: nn.Module
    tokenizer: Any
    anatomy: Anatomy
    path: Path
    model_id: str


@cache
def compute_dtype(device: str = "cpu") -> torch.dtype:
    """The type forwards are fastest in: bfloat16 on CUDA and on CPUs with AVX512_BF16 or AMX, else float32.

    On a CPU without those instructions bfloat16 products of more than a few rows are several times slower than float32.
    """
    if torch.device(device).type == "cuda":
        return torch.bfloat16
    has_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if has_bf16 else torch.float32


def load(path_or_id: str | Path, dtype: torch.dtype | None = None, device: str | None = None) -> Loaded:
    """The model of a library id or a folder. `dtype` None keeps the stored type.

    Raises InputError when it cannot or must not be loaded: see the module's first lines.
    """
    folder, model_id = locate(path_or_id)
    local.check_folder(folder)
    _check_config(folder)
    dtype = dtype or stored_dtype(folder)
    keep_freed()
    model = _read(folder, dtype)
    _check_finite(model, folder)
    model.eval().requires_grad_(False)
    attention.use_own(model)
    between.use_own(model)
    tokenizer = load_tokenizer(folder)
    return Loaded(model.to(device) if device else model, tokenizer, anatomy_of(model, model_id), folder, model_id)


def locate(path_or_id: str | Path) -> tuple[Path, str]:
    """(folder, model id) of a folder's path or a library id. Raises InputError when there is neither."""
    path = Path(path_or_id)
    if path.is_dir():
        return path, path.name
    local.refuse_pickle(path)
    if path.suffix == ".gguf":
        raise InputError(f"{path.name} is a GGUF file.", "Its weights are made dense once, when it is added.", "Add it to the models first.")
    from bitpress.engine.model import library

    return library.model_path(str(path_or_id)), str(path_or_id)


def load_tokenizer(path: Path) -> Any:
    """The tokenizer of a model's folder. Raises InputError when its files cannot be read."""
    try:
        return transformers.AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # tokenizer files can be wrong in any way; all of them mean the same to a person
        raise InputError(f"The tokenizer of {path.name} cannot be read.", _said(error), "Save the tokenizer into the folder again.") from error


def stored_dtype(folder: Path) -> torch.dtype:
    """The floating type that most bytes of the folder's weights are in. Raises InputError for damaged files or codes instead of weights."""
    sizes: Counter[str] = Counter()
    for path in local.weight_files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - not a dict: iterating over it fails
                    piece = file.get_slice(name)
                    sizes[piece.get_dtype()] += torch.Size(piece.get_shape()).numel()
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path.name} is damaged.", _said(error), AGAIN) from error
    found = sizes.most_common(1)[0][0] if sizes else "none"
    if found not in STORED:
        why = f"Its weights are of type {found}."
        raise InputError(f"{folder.name} holds no dense weights.", why, "Use the uncompressed model, in float or bfloat16.")
    return STORED[found]


def _check_config(folder: Path) -> None:
    config = local.read_json(folder / "config.json")
    if config.get("quantization_config"):
        raise InputError(f"{folder.name} is already quantised.", "Its config has a quantization_config.", "Use the dense model it was made from.")
    kind = config.get("model_type")
    encoder = kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not config.get("is_decoder")
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or encoder:
        why = f"transformers knows model_type {kind!r} as no causal language model."
        raise InputError(f"{folder.name} cannot be loaded.", why, "Choose a model that writes text from left to right, such as a Llama.")


def _read(folder: Path, dtype: torch.dtype) -> nn.Module:
    transformers.utils.logging.disable_progress_bar()
    try:
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            str(folder), dtype=dtype, use_safetensors=True, local_files_only=True, trust_remote_code=False, output_loading_info=True
        )
    except MemoryError:
        raise BitpressError(f"{folder.name} does not fit into memory.", "", "Close other programs, or choose a smaller model.") from None
    except Exception as error:  # config and weights come from anywhere and can disagree in any way
        raise InputError(f"{folder.name} cannot be loaded.", _said(error), AGAIN) from error
    # transformers fills what a file lacks with random values and only warns.
    if lacking := sorted(info["missing_keys"]):
        raise InputError(f"{folder.name} is incomplete.", f"{len(lacking)} tensors are missing, such as {lacking[0]}.", AGAIN)
    return model


def _check_finite(model: nn.Module, folder: Path) -> None:
    """A sum is NaN or infinite whenever a term is, and is far cheaper than a mask of every weight."""
    for name, weight in model.named_parameters():
        if not weight.sum(dtype=torch.float64 if weight.dtype == torch.float32 else torch.float32).isfinite():
            raise InputError(f"{folder.name} has broken weights.", f"{name} holds values that are not numbers, or infinite.", AGAIN)


def _said(error: Exception) -> str:
    """A library's message on one line, at most 300 characters."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
