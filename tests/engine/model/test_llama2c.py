"""llama2.c checkpoints: the converted model computes what llama2.c computes, the tokenizer what SentencePiece does."""

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitpress.engine.errors import InputError
from bitpress.engine.model import llama2c

DIM, HIDDEN, LAYERS, HEADS, KV_HEADS, CONTEXT = 16, 24, 2, 4, 2, 32
HEAD = DIM // HEADS
VOCAB = 300


def checkpoint(seed: int = 0, tied: bool = True, vocab: int = VOCAB) -> tuple[bytes, dict[str, np.ndarray]]:
    """A random checkpoint in the file's own order, and its tensors under llama2.c's names."""
    random = np.random.default_rng(seed)
    kv = KV_HEADS * HEAD
    shapes = {
        "embedding": (vocab, DIM), "att_norm": (LAYERS, DIM), "wq": (LAYERS, DIM, DIM), "wk": (LAYERS, kv, DIM), "wv": (LAYERS, kv, DIM),
        "wo": (LAYERS, DIM, DIM), "ffn_norm": (LAYERS, DIM), "w1": (LAYERS, HIDDEN, DIM), "w2": (LAYERS, DIM, HIDDEN), "w3": (LAYERS, HIDDEN, DIM),
        "norm": (DIM,), "rotary": (2, CONTEXT, HEAD // 2),
    }  # fmt: skip
    if not tied:
        shapes["head"] = (vocab, DIM)
    tensors = {name: random.normal(0, 0.3, shape).astype("<f4") for name, shape in shapes.items()}
    header = struct.pack("<7i", DIM, HIDDEN, LAYERS, HEADS, KV_HEADS, vocab if tied else -vocab, CONTEXT)
    return header + b"".join(tensor.tobytes() for tensor in tensors.values()), tensors


def pieces_file(pieces: list[tuple[bytes, float]]) -> bytes:
    longest = struct.pack("<i", max(len(piece) for piece, _ in pieces))
    return longest + b"".join(struct.pack("<fi", score, len(piece)) + piece for piece, score in pieces)


def llama2c_logits(w: dict[str, np.ndarray], tokens: list[int]) -> np.ndarray:
    """What llama2.c computes, one position at a time, with rotary pairs (0, 1), (2, 3), ...; logits [position, vocab]."""

    def rms(x: np.ndarray, gain: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x * x).mean() + 1e-5) * gain

    def rotate(x: np.ndarray, position: int) -> np.ndarray:
        out = x.copy()
        for pair in range(0, len(x), 2):
            angle = position / 10000.0 ** ((pair % HEAD) / HEAD)
            a, b = x[pair], x[pair + 1]
            out[pair], out[pair + 1] = a * np.cos(angle) - b * np.sin(angle), a * np.sin(angle) + b * np.cos(angle)
        return out

    keys: list[list[np.ndarray]] = [[] for _ in range(LAYERS)]
    values: list[list[np.ndarray]] = [[] for _ in range(LAYERS)]
    rows = []
    for position, token in enumerate(tokens):
        x = w["embedding"][token].astype(np.float64)
        for layer in range(LAYERS):
            h = rms(x, w["att_norm"][layer])
            q = rotate(w["wq"][layer] @ h, position).reshape(HEADS, HEAD)
            keys[layer].append(rotate(w["wk"][layer] @ h, position).reshape(KV_HEADS, HEAD))
            values[layer].append((w["wv"][layer] @ h).reshape(KV_HEADS, HEAD))
            heads = []
            for head in range(HEADS):
                group = head // (HEADS // KV_HEADS)
                scores = np.array([q[head] @ key[group] for key in keys[layer]]) / np.sqrt(HEAD)
                chances = np.exp(scores - scores.max())
                chances /= chances.sum()
                heads.append(sum(c * value[group] for c, value in zip(chances, values[layer], strict=True)))
            x = x + w["wo"][layer] @ np.concatenate(heads)
            h = rms(x, w["ffn_norm"][layer])
            gate = w["w1"][layer] @ h
            x = x + w["w2"][layer] @ (gate / (1 + np.exp(-gate)) * (w["w3"][layer] @ h))
        rows.append(w.get("head", w["embedding"]) @ rms(x, w["norm"]))
    return np.array(rows)


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory: pytest.TempPathFactory, story: str) -> Any:
    """A SentencePiece-BPE with byte fallback, trained on the story: the oracle of the tokenizer."""
    sentencepiece = pytest.importorskip("sentencepiece")
    folder = tmp_path_factory.mktemp("spm")
    (folder / "text.txt").write_text(story.replace(". ", ".\n"))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"), model_prefix=str(folder / "m"), vocab_size=360, model_type="bpe", byte_fallback=True,
        character_coverage=1.0, normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "m.model"))


def exported(model: Any, raw_bytes: bool) -> bytes:
    """The tokenizer file llama2.c's exporter writes: spaces for the underline, new lines around <s> and </s>."""
    pieces = []
    for index in range(model.vocab_size()):
        text = model.id_to_piece(index).replace("▁", " ")
        text = {1: "\n<s>\n", 2: "\n</s>\n"}.get(index, text)
        if raw_bytes and model.is_byte(index):
            text = chr(int(text[3:5], 16))
        pieces.append((text.encode(), model.get_score(index)))
    return pieces_file(pieces)


@pytest.mark.parametrize("tied", [True, False])
def test_the_converted_model_computes_what_llama2c_computes(tmp_path: Path, sentencepiece_model: Any, tied: bool) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    vocab = sentencepiece_model.vocab_size()
    data, tensors = checkpoint(tied=tied, vocab=vocab)
    source = tmp_path / "model.data"
    source.write_bytes(data + exported(sentencepiece_model, raw_bytes=True))
    (tmp_path / "out").mkdir()
    llama2c.convert(source, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    tokens = [1, 17, 205, 40, 290, 3, 111]
    with torch.inference_mode():
        found = model(torch.tensor([tokens])).logits[0].numpy()
    np.testing.assert_allclose(found, llama2c_logits(tensors, tokens), rtol=2e-3, atol=2e-4)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("Once upon a time").input_ids == [1, *sentencepiece_model.encode("Once upon a time")]
    assert model.generation_config.eos_token_id == [1, 2], "a story ends where the next would begin"


def test_the_oracle_notices_rotary_rows_left_in_place() -> None:
    """Without the reordering the logits differ far beyond the tolerance, so the test above can fail."""
    _, tensors = checkpoint()
    tokens = [1, 17, 205, 40]
    moved = dict(tensors, wq=np.stack([llama2c._half_split(layer, HEADS) for layer in tensors["wq"]]))
    assert np.abs(llama2c_logits(moved, tokens)[2:] - llama2c_logits(tensors, tokens)[2:]).max() > 0.01


@pytest.mark.parametrize("raw_bytes", [True, False])
def test_the_tokenizer_agrees_with_sentencepiece(sentencepiece_model: Any, story: str, raw_bytes: bool) -> None:
    vocab = sentencepiece_model.vocab_size()
    tokenizer = llama2c.build_tokenizer(llama2c.read_pieces(exported(sentencepiece_model, raw_bytes), vocab))
    for text in (story, "Lily was sad.", "the  old   stone", "a\nb\tc", "naïve ☃ bear", "Zebra!", "x"):
        ids = tokenizer.encode(text).ids
        assert ids == [1, *sentencepiece_model.encode(text)], text
        assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("change", ["header", "short", "long", "shape", "heads"])
def test_a_damaged_checkpoint_is_refused_with_its_reason(change: str) -> None:
    data, _ = checkpoint()
    damaged, why = {
        "header": (data[:20], "header alone takes 28"),
        "short": (data[:-400], "ends after"),
        "long": (data + b"\0" * 8, "8 bytes follow the last weight"),
        "shape": (struct.pack("<7i", 0, *struct.unpack_from("<6i", data, 4)) + data[28:], "not the shape"),
        "heads": (struct.pack("<7i", DIM, HIDDEN, LAYERS, 5, KV_HEADS, VOCAB, CONTEXT) + data[28:], "not the shape"),
    }[change]
    with pytest.raises(InputError, match=why) as refusal:
        llama2c.read_checkpoint(damaged)
    assert refusal.value.remedy


@pytest.mark.parametrize("keep", [2, 9, 40])
def test_a_tokenizer_cut_short_is_refused(keep: int) -> None:
    file = pieces_file([(b"<unk>", 0.0), (b"<s>", 0.0), (b"</s>", 0.0), (b"abc", -1.0)])
    assert len(llama2c.read_pieces(file, 4)) == 4
    with pytest.raises(InputError, match=r"cut short|ends after"):
        llama2c.read_pieces(file[:keep], 4)


def test_the_checkpoints_length_is_known_from_its_header() -> None:
    for tied in (True, False):
        data, _ = checkpoint(tied=tied)
        assert llama2c.checkpoint_bytes(data + b"tokenizer") == len(data)
