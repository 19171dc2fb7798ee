"""The Triton kernels compiled to machine code for the cards they are meant for, which needs no card: no registers may spill to memory."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

# In a process of its own: this one may have been told to interpret.
COMPILE = """
import json, re, subprocess, sys, tempfile
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from bitpress.kernels import gpu_kernels

WORDS = {0: "*u8", 1: "*u8", 2: "*i16", 4: "*i32"}
kind, low, high, planes, run, scaled, outputs, batch, splits, warps, stages, capability = json.loads(sys.argv[1])
names = gpu_kernels.linear.arg_names
constants = dict(KIND=kind, LOW=low, HIGH=high, PLANES=planes, MIDDLE=8.0, ZEROS=True, WHOLE=True, RUN=run, EVEN=True, SCALED=scaled, SPLITS=splits,
                 BLOCK_N=outputs, BLOCK_M=batch, STAGES=stages, INTERPRETED=False)
pointers = dict(x="*bf16", y="*bf16", partials="*fp32", arrivals="*i32", low=WORDS[low], high=WORDS[high], table="*fp32", scales="*bf16", zeros="*u8",
                shifts="*bf16")
signature = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in names}
aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in (*pointers, "N", "K")}
source = ASTSource(fn=gpu_kernels.linear, signature=signature, constexprs={(names.index(name),): value for name, value in constants.items()}, attrs=aligned)
made = compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder, "kernel.cubin")
    path.write_bytes(made.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    usage = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True).stdout
found = re.search(r"REG:(\\d+) STACK:(\\d+)", usage)
print(json.dumps({"registers": int(found[1]), "stack": int(found[2]), "shared": made.metadata.shared, "tensor_cores": "mma" in made.asm["ptx"]}))
"""
SHARED_BYTES = 227 << 10  # of a block on compute capability 9.0; 8.0 has 163
CASES = {
    "2 bits": (0, 2, 0, 0, 2, False, 32, 16, 4, 2, 3), "3 bits": (0, 2, 1, 0, 2, False, 32, 16, 4, 2, 3), "4 bits": (0, 4, 0, 0, 2, False, 32, 16, 4, 2, 3),
    "4 bits, wide": (0, 4, 0, 0, 2, False, 64, 16, 4, 2, 3),
    "5 bits": (0, 4, 1, 0, 1, False, 32, 16, 4, 2, 3),
    "6 bits": (0, 4, 2, 0, 4, False, 32, 16, 4, 2, 3),
    "8 bits": (0, 4, 4, 0, 8, False, 32, 16, 4, 4, 3), "nf4": (1, 4, 0, 0, 2, True, 32, 16, 4, 2, 1), "binary": (2, 1, 0, 2, 2, False, 32, 8, 4, 4, 1),
    "4 bits, prefill": (0, 4, 0, 0, 2, True, 64, 64, 1, 4, 2),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("case", CASES)
def test_compiles_for_tensor_cores_and_spills_nothing(case: str, capability: int) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    asked = json.dumps([*CASES[case], capability])
    shown = subprocess.run([sys.executable, "-c", COMPILE, asked], capture_output=True, text=True, timeout=240, env=environment)
    assert shown.returncode == 0, shown.stderr[-3000:]
    found = json.loads(shown.stdout)
    assert found["tensor_cores"] and found["stack"] == 0 and found["shared"] <= SHARED_BYTES, found
