"""Int4 and int8 weight-only linears of torchao, cold, one row: THREADS OUTPUTS INPUTS. Runs in a Python that has torchao."""

import json
import statistics
import sys
import time

import torch
import torchao
from torchao.prototype.quantization.int4.inference_workflow import PrototypeInt4WeightOnlyConfig
from torchao.quantization import Int8WeightOnlyConfig, quantize_

threads, outputs, inputs = (int(value) for value in sys.argv[1:4])
torch.set_num_threads(threads)
CONFIGS = {"int4": (4, lambda: PrototypeInt4WeightOnlyConfig(group_size=128)), "int8": (8, Int8WeightOnlyConfig)}


def timed(bits: int, config: object) -> dict[str, float]:
    """Seconds of a call, in turn over as many copies as no cache holds."""
    copies = max(2, (160 << 20) * 8 // (outputs * inputs * bits))
    layers = [torch.nn.Sequential(torch.nn.Linear(inputs, outputs, bias=False, dtype=torch.bfloat16)) for _ in range(copies)]
    for layer in layers:
        quantize_(layer, config)
    x, times = torch.randn(1, inputs, dtype=torch.bfloat16), []
    with torch.inference_mode():
        for round_ in range(6):
            for layer in layers:
                began = time.perf_counter()
                layer(x)
                times += [time.perf_counter() - began] if round_ else []
    times.sort()
    return {"p10_s": times[len(times) // 10], "p50_s": statistics.median(times)}


found = {}
for name, (bits, config) in CONFIGS.items():
    try:
        found[name] = timed(bits, config())
    except Exception as error:  # a kind that this version has no CPU path for
        found[name] = {"skipped": f"{type(error).__name__}: {str(error).splitlines()[0][:160] if str(error) else ''}"}
print(json.dumps({"version": torchao.__version__, "ran": "weight-only linears, not compiled", "kinds": found}))
