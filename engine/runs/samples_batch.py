"""Continue several prompts at once with one model, as a run. Knows a task and its samples; leaves the writing to `generate_batch`."""

from typing import Any

from bitpress.engine.generate import Sampling, Token
from bitpress.engine.generate_batch import generate_batch
from bitpress.engine.runs import samples
from bitpress.engine.runs.resident import Resident
from bitpress.engine.runs.task import Task


def write_at_once(task: Task, resident: Resident, side: str, sampling: Sampling) -> dict[str, Any]:
    """Tell every token as an event and keep the texts; gives `{samples: [{prompt, side, text, ended, seconds, tokens}], seconds, tokens_per_s, reason}`.

    `reason` is there where the texts had to be written one after another. Every prompt gets the same sampling and seed, as it would alone.
    Raises Cancelled between tokens; InputError as `generate_batch`.
    """
    tokenizer, prompts = resident.loaded.tokenizer, task.args["prompts"]
    told = [0] * len(prompts)

    def tell(row: int, token: Token) -> None:
        task.check()
        values = token.as_dict()
        task.emit("sample", {"prompt": prompts[row], "side": side, "sequence": row, "index": told[row], "token": values.pop("id"), **values})
        told[row] += 1

    ids = [samples.prompt_ids(tokenizer, prompt, resident.entry.needs_bos) for prompt in prompts]
    model = resident.side(side)
    task.phase("generating")
    batch = generate_batch(model, tokenizer, ids, sampling, tell)
    written = [
        {"prompt": prompt, "side": side, "text": text.text, "ended": text.ended, "seconds": text.seconds, "tokens": [token.as_dict() for token in text.tokens]}
        for prompt, text in zip(prompts, batch.texts, strict=True)
    ]
    samples.keep(task, written)
    reason = {"reason": batch.reason} if batch.reason else {}
    return {"samples": written, "seconds": batch.seconds, "tokens_per_s": batch.tokens_per_s, **reason}
