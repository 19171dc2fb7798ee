"""llama.cpp on a GGUF file, timed as `bitpress bench decode` times its own sides: THREADS FILE PROMPT NEW. Runs in a Python that has llama_cpp."""

import json
import statistics
import sys
import time

import llama_cpp

threads, path, prompt, new = int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
model = llama_cpp.Llama(path, n_ctx=prompt + new + 8, n_threads=threads, n_threads_batch=threads, verbose=False)
ids = [1 + (7 * place) % (model.n_vocab() - 2) for place in range(prompt)]


def once(count: int) -> tuple[float, float]:
    """(seconds of the prompt, seconds of `count` greedy steps; an end token does not stop them)."""
    model.reset()
    began = time.perf_counter()
    model.eval(ids)
    ready = time.perf_counter()
    for _ in range(count):
        model.eval([model.sample(temp=0.0)])
    return ready - began, time.perf_counter() - ready


once(8)
rounds = [once(new) for _ in range(5)]
ttft, steps = (statistics.median(column) for column in zip(*rounds, strict=True))
rates = {"prefill_tokens_per_s": prompt / ttft, "decode_tokens_per_s": new / steps, "ttft_s": ttft}
print(json.dumps({"version": llama_cpp.__version__, "rounds": len(rounds), **rates}))
