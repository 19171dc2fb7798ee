"""How fast a model writes, dense and at several widths, in the same loop and in turn: `bitpress bench decode`. Knows what to time; timing is `latency`'s.

In a batch every row reads the same prompt by itself and all are stepped together; the rates are of all rows, a token's time is a step's.

Every side is really packed by rounding to nearest, in memory only. Dense means dense weights in our own loop;
transformers means the same weights in the loop that everybody has.
"""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.generation.streamers import BaseStreamer

from bitpress.engine import rivals
from bitpress.engine.compress import compress
from bitpress.engine.decode import Decoder
from bitpress.engine.decode_batch import BatchDecoder
from bitpress.engine.gguf_file import write_gguf
from bitpress.engine.measure.latency import Latency, Plan, measure_latency
from bitpress.engine.measure.memory import weights_of
from bitpress.engine.measure.report import latency_figures
from bitpress.engine.model import library, load
from bitpress.engine.recipe import Recipe
from bitpress.engine.runs import machine

WIDTHS = (8, 4, 3, 2)
QUICK_WIDTHS = (4,)
GROUP = 64
PROMPT = 512
DENSE, TRANSFORMERS = "dense", "transformers"


class _EachToken(BaseStreamer):
    """Passes on that a new token is there; the prompt, which `generate` hands over first, is none."""

    def __init__(self, on_token: Callable[[], object]) -> None:
        self.on_token, self.prompt_seen = on_token, False

    def put(self, value: Tensor) -> None:
        if self.prompt_seen:
            self.on_token()
        self.prompt_seen = True

    def end(self) -> None:
        return


class TransformersGenerate:
    """A `latency.Teller`: greedy `transformers.generate` with the cache that it chooses."""

    def __init__(self, model: nn.Module, batch: int = 1) -> None:
        self.model: Any = model
        self.batch = batch

    def tell(self, prompt_T: Tensor, new: int, on_token: Callable[[], object]) -> None:
        """Write `new` tokens after `prompt_T`, end tokens suppressed."""
        ids_BT = prompt_T[None].expand(self.batch, -1)
        self.model.generate(ids_BT, attention_mask=torch.ones_like(ids_BT), do_sample=False, pad_token_id=0, min_new_tokens=new, max_new_tokens=new,
                            streamer=_EachToken(on_token))  # fmt: skip

    @property
    def conditions(self) -> dict[str, str]:
        """As `Decoder.conditions`."""
        dtype = str(next(self.model.parameters()).dtype).removeprefix("torch.")
        return {"loop": "transformers.generate", "step_dtype": dtype, "prefill_dtype": dtype, "kv_dtype": dtype}


class BatchTeller:
    """A `latency.Teller` of our own loop: greedy, every row on the same prompt."""

    def __init__(self, decoder: BatchDecoder) -> None:
        self.decoder = decoder

    def tell(self, prompt_T: Tensor, new: int, on_token: Callable[[], object]) -> None:
        """Write `new` tokens in every row. `on_token` is called once for all rows."""
        logits_BV = torch.stack([self.decoder.prefill(row, prompt_T) for row in range(self.decoder.size)])
        ids_B = logits_BV.argmax(-1).cpu()
        on_token()
        for _ in range(new - 1):
            ids_B = self.decoder.step(ids_B).argmax(-1).cpu()
            on_token()

    @property
    def conditions(self) -> dict[str, str]:
        """As `Decoder.conditions`."""
        return self.decoder.conditions


def of_all_rows(latency: Latency, batch: int) -> Latency:
    """The figures of a Teller that calls once for `batch` rows: rates count every row's tokens."""
    prefill, decode = batch * latency.prefill_tokens_per_s, batch * latency.decode_tokens_per_s
    return replace(latency, prefill_tokens_per_s=prefill, decode_tokens_per_s=decode, conditions={**latency.conditions, "batch": batch})


def decode_table(model_id: str | None = None, quick: bool = False, widths: Sequence[int] = (), plan: Plan | None = None, batch: int = 1) -> dict[str, Any]:
    """Time every side. `model_id` None: the recommended model where it is installed, else the built-in one.

    widths: of the packed sides, (): the usual. plan: None for the usual one. batch: sequences that are written at once.

    Returns `{machine, rows: [{side, model, bits_per_weight_model, bytes, prefill_tokens_per_s, decode_tokens_per_s, ttft_s,
    tpot_p50_s, tpot_p95_s, times_dense, conditions}]}`. Raises InputError for a model that is unknown or not installed,
    and for a batch that cannot be decoded.
    """
    loaded = load.load(model_id or _default_model())
    widths = widths or (QUICK_WIDTHS if quick else WIDTHS)
    models = {DENSE: loaded.model} | {f"{bits}-bit": compress(loaded, _recipe(loaded.model_id, bits)).model for bits in widths}
    plan = plan or (Plan(prompt=32, new=32, rounds=3, seconds=3.0) if quick else Plan())
    plan = plan.fitted(loaded.anatomy.context)
    decoders = {TRANSFORMERS: TransformersGenerate(loaded.model, batch)} | {side: _decoder(model, plan, batch) for side, model in models.items()}
    prompt_T = torch.randint(loaded.anatomy.vocab, (plan.prompt,), generator=torch.Generator().manual_seed(0))
    found = {side: of_all_rows(latency, batch) for side, latency in measure_latency(decoders, prompt_T, plan).items()}
    rows = []
    for side, latency in found.items():
        weights = weights_of(models.get(side, loaded.model), loaded.anatomy.block_prefix, loaded.anatomy.itemsize)
        gain = latency.decode_tokens_per_s / found[DENSE].decode_tokens_per_s
        rows.append({"side": side, "model": loaded.model_id, "bits_per_weight_model": weights.bits_per_weight_model, "bytes": weights.stored_bytes,
                     **latency_figures(latency), "times_dense": gain, "conditions": {**latency.conditions, **decoders[side].conditions}})  # fmt: skip
    return {"machine": machine.describe(), "rows": rows}


def _decoder(model: nn.Module, plan: Plan, batch: int) -> Decoder | BatchTeller:
    """Of one sequence: the loop that is fastest for one."""
    length = plan.prompt + plan.new
    return Decoder(model, None, length) if batch == 1 else BatchTeller(BatchDecoder(model, batch, None, length))


def prefill_table(model_id: str | None = None, quick: bool = False, widths: Sequence[int] = ()) -> dict[str, Any]:
    """The same for a long prompt: 512 tokens, where multiplying is what costs. `times_dense` is of the prefill rates here."""
    plan = Plan(prompt=PROMPT, new=2, warm_up=1, rounds=5 if quick else 10, seconds=4.0)
    report = decode_table(model_id, quick, widths, plan)
    dense = next(row for row in report["rows"] if row["side"] == DENSE)["prefill_tokens_per_s"]
    for row in report["rows"]:
        row["times_dense"] = row["prefill_tokens_per_s"] / dense
    return report


def with_rival(report: dict[str, Any], pythons: Mapping[str, str], gguf: str | None) -> dict[str, Any]:
    """The report with llama.cpp's row for the same prompt and number of tokens, or the reason why there is none.

    gguf: a file of the same weights; None writes one of 4-bit weights and an 8-bit embedding, for as long as it is timed.
    """
    conditions = {key: report["rows"][0]["conditions"][key] for key in ("batch", "prompt", "new", "threads")}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(gguf) if gguf else Path(folder) / "q4_0, embedding q8_0"
        if gguf is None and "llama.cpp" in pythons:
            write_gguf(load.load(report["rows"][0]["model"]), path)
        asked = rivals.ask("llama.cpp", pythons, str(path), str(conditions["prompt"]), str(conditions["new"]))
    if "skipped" in asked:
        return {**report, "skipped": {asked["rival"]: asked["skipped"]}}
    own = {"loop": "llama.cpp, after the others", "rounds": asked.pop("rounds"), "file": path.name}
    return {**report, "rows": [*report["rows"], {"side": asked.pop("rival"), "conditions": {**conditions, **own}, **asked}]}


def _default_model() -> str:
    ready = [entry for entry in library.list_models() if entry.ready]
    return max(ready, key=lambda entry: entry.recommended).id


def _recipe(model_id: str, bits: int) -> Recipe:
    """Every block linear at so many bits, the embedding and its tied head at 8."""
    scheme = {"match": "*", "weights": {"bits": bits, "group_size": GROUP}}
    return Recipe.from_dict({"model": model_id, "schemes": [scheme], "embedding": {"bits": 8}, "stages": [{"method": "rtn"}]})
