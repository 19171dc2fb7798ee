"""One row times an NF4 matrix in bitsandbytes, cold: THREADS OUTPUTS INPUTS. Runs in a Python that has bitsandbytes."""

import json
import statistics
import sys
import time

import bitsandbytes
import torch

threads, outputs, inputs = (int(value) for value in sys.argv[1:4])
torch.set_num_threads(threads)
dense = torch.nn.Linear(inputs, outputs, bias=False, dtype=torch.bfloat16)
copies = max(2, (160 << 20) // (outputs * inputs // 2))
layers = []
for _ in range(copies):
    layer = bitsandbytes.nn.Linear4bit(inputs, outputs, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
    layer.load_state_dict(dense.state_dict())
    layers.append(layer.to("cpu").eval())
x = torch.randn(1, inputs, dtype=torch.bfloat16)
times = []
with torch.inference_mode():
    for layer in layers:
        layer(x)
    for _ in range(5):
        for layer in layers:
            began = time.perf_counter()
            layer(x)
            times.append(time.perf_counter() - began)
times.sort()
print(json.dumps({"version": bitsandbytes.__version__, "p10_s": times[len(times) // 10], "p50_s": statistics.median(times)}))
