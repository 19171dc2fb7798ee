"""A 4-bit linear of HQQ, cold, one row: THREADS OUTPUTS INPUTS. Runs in a Python that has hqq. On a CPU it dequantises, then multiplies."""

import copy
import importlib.metadata
import json
import statistics
import sys
import time

import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQBackend, HQQLinear

threads, outputs, inputs = (int(value) for value in sys.argv[1:4])
torch.set_num_threads(threads)
HQQLinear.set_backend(HQQBackend.PYTORCH)
config = BaseQuantizeConfig(nbits=4, group_size=64)
dense = torch.nn.Linear(inputs, outputs, bias=False, dtype=torch.bfloat16)
layers = [HQQLinear(dense, config, compute_dtype=torch.bfloat16, device="cpu", del_orig=False)]
copies = max(2, (160 << 20) // (outputs * inputs // 2))
layers += [copy.deepcopy(layers[0]) for _ in range(copies - 1)]  # the same codes elsewhere in memory: rounding them anew takes minutes
x, times = torch.randn(1, inputs, dtype=torch.bfloat16), []
with torch.inference_mode():
    layers[0](x)
    ends = time.perf_counter() + 30
    for _ in range(2):
        for layer in layers:
            began = time.perf_counter()
            layer(x)
            times.append(time.perf_counter() - began)
            if began > ends:
                break
times.sort()
ran = "dequantises into bfloat16 with torch operations, then a dense matmul: hqq brings no low-bit CPU kernel"
print(json.dumps({"version": importlib.metadata.version("hqq"), "ran": ran, "p10_s": times[len(times) // 10], "p50_s": statistics.median(times)}))
