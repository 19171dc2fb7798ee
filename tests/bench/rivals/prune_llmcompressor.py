"""Prunes a model with llm-compressor, in its own environment: run as a program by `pruning.py`, imported by nothing.

Arguments: model folder, folder of the result, method (wanda or sparsegpt), pattern (0:0 or N:M), file of token ids (JSON, sequences of equal length).
"""

import json
import sys
from pathlib import Path

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
from transformers import AutoModelForCausalLM, AutoTokenizer

MODIFIERS = {"wanda": WandaPruningModifier, "sparsegpt": SparseGPTModifier}


def main(model_folder: str, result: str, method: str, pattern: str, ids_file: str) -> None:
    """Prune half of every block linear and save the dense weights with their zeros."""
    ids = json.loads(Path(ids_file).read_text())
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    data = Dataset.from_list([{"input_ids": row, "attention_mask": [1] * len(row)} for row in ids])
    recipe = MODIFIERS[method](sparsity=0.5, mask_structure=pattern, targets=["Linear"], ignore=["re:.*lm_head"])
    oneshot(
        model=model, tokenizer=tokenizer, dataset=data, recipe=recipe, num_calibration_samples=len(ids), max_seq_length=len(ids[0]),
        shuffle_calibration_samples=False, pipeline="sequential",
    )  # fmt: skip
    model.save_pretrained(result, save_compressed=False)
    tokenizer.save_pretrained(result)


if __name__ == "__main__":
    main(*sys.argv[1:])
