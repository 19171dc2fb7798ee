"""Several sequences at once: logits and tokens of each are those it has alone, whatever the others do."""

import pytest
import torch

from bitpress.engine import decode_batch
from bitpress.engine.decode import Decoder
from bitpress.engine.decode_batch import BatchDecoder, window
from bitpress.engine.errors import InputError
from bitpress.engine.recipe import KVCache

OWN = ("llama", "llama_untied", "mistral", "qwen2", "qwen3")
LENGTHS = (3, 11, 1, 20)


def texts(length: int = 45) -> list[torch.Tensor]:
    """Random ids, one text a row of the batch."""
    made = torch.Generator().manual_seed(1)
    return [torch.randint(2, 320, (start + length,), generator=made) for start in LENGTHS]


def alone(model, ids_T: torch.Tensor, prompt: int, dtype: torch.dtype | None = torch.float32) -> torch.Tensor:
    decoder = Decoder(model, dtype=dtype)
    return torch.stack([decoder.prefill(ids_T[:prompt]), *(decoder.step(int(token)) for token in ids_T[prompt:])])


def together(batch: BatchDecoder, rows: list[torch.Tensor]) -> torch.Tensor:
    """[steps + 1, B, V]."""
    first = torch.stack([batch.prefill(row, ids_T[:start]) for row, (ids_T, start) in enumerate(zip(rows, LENGTHS, strict=True))])
    later = [ids_T[start:] for ids_T, start in zip(rows, LENGTHS, strict=True)]
    return torch.stack([first, *(batch.step(torch.stack(ids)) for ids in zip(*later, strict=True))])


@pytest.mark.parametrize("family", OWN)
def test_each_row_has_the_logits_it_has_alone(tiny_models, family, monkeypatch) -> None:
    monkeypatch.setattr(decode_batch, "WINDOW", 8)  # several windows are crossed
    model, rows = tiny_models(family), texts()
    found = together(BatchDecoder(model, 4, dtype=torch.float32), rows)
    for row, (ids_T, start) in enumerate(zip(rows, LENGTHS, strict=True)):
        torch.testing.assert_close(found[:, row], alone(model, ids_T, start), atol=2e-5, rtol=1e-4)


def test_biases_and_groups_of_unlike_size(tiny_models) -> None:
    model, rows = tiny_models("llama", attention_bias=True, mlp_bias=True), texts(12)
    for name, tensor in model.named_parameters():
        if name.endswith("bias"):
            tensor.copy_(torch.randn_like(tensor))
    model.model.layers[1].self_attn.key_head_of = torch.tensor([0, 1, 1, 1])
    found = together(BatchDecoder(model, 4, dtype=torch.float32), rows)
    for row, (ids_T, start) in enumerate(zip(rows, LENGTHS, strict=True)):
        torch.testing.assert_close(found[:, row], alone(model, ids_T, start), atol=2e-5, rtol=1e-4)


def test_the_types_of_the_rule_agree_with_float32(tiny_models) -> None:
    model, rows = tiny_models("llama"), texts(12)
    found = together(BatchDecoder(model, 4), rows)
    for row, (ids_T, start) in enumerate(zip(rows, LENGTHS, strict=True)):
        expected = alone(model, ids_T, start)
        assert float((found[:, row] - expected).norm() / expected.norm()) < 0.05


def test_a_row_begins_anew_while_others_go_on_and_dropped_ones_are_never_full(tiny_models) -> None:
    model, rows = tiny_models("llama"), texts(20)
    batch = BatchDecoder(model, 2, max_length=30, dtype=torch.float32)
    for row in (0, 1):
        batch.prefill(row, rows[row][:3])
    for token in rows[0][3:9]:
        batch.step([int(token), 5])
    batch.drop(1)
    for token in rows[0][9:20]:
        batch.step([int(token), 7])
    batch.prefill(1, rows[1][:28])
    expected = alone(model, torch.cat((rows[0][:20], rows[0][20:22])), 20)[1:]
    other = alone(model, rows[1][:30], 28)[1:]
    for step in range(2):
        found = batch.step([int(rows[0][20 + step]), int(rows[1][28 + step])])
        torch.testing.assert_close(found, torch.stack((expected[step], other[step])), atol=2e-5, rtol=1e-4)
    with pytest.raises(InputError, match="do not fit"):
        batch.step([4, 4])
    batch.drop(1)
    for _ in range(8):
        assert bool(batch.step([4, 4])[0].isfinite().all())


def test_windows_hold_the_longest_and_no_more_than_there_is() -> None:
    assert [window(longest, 1000) for longest in (1, 128, 129, 512, 513, 900)] == [128, 128, 256, 512, 1000, 1000]
    assert window(5, 40) == 40


def test_what_cannot_be_batched_is_refused_in_words(tiny_models) -> None:
    with pytest.raises(InputError, match="gpt2"):
        BatchDecoder(tiny_models("gpt2"), 2)
    held = tiny_models("llama")
    held.kv_scheme = KVCache.model_validate({"keys": {"bits": 8, "axis": "channel"}, "values": {"bits": 8, "axis": "token"}})
    with pytest.raises(InputError, match="compressed"):
        BatchDecoder(held, 2)
    with pytest.raises(InputError, match="at least one"):
        BatchDecoder(tiny_models("llama"), 0)


def test_tokens_that_do_not_fit_the_batch_are_refused(tiny_models) -> None:
    batch = BatchDecoder(tiny_models("llama"), 2, max_length=10)
    with pytest.raises(InputError, match="takes 2"):
        batch.step([1, 2, 3])
    with pytest.raises(InputError, match="room for 10"):
        batch.prefill(0, list(range(2, 13)))
    with pytest.raises(InputError, match="Prompt 2 is empty"):
        batch.prefill(1, [])
