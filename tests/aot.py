"""Compile Triton kernels ahead of time, without a GPU, and read what they cost from the machine code.

A launcher is called as ever, but with meta tensors and with `JITFunction.run` replaced: each launch is bound
and specialised as the runtime does it, compiled for the chip asked for, and not run. So the tests check what
the launcher chooses, at the true sizes. Triton's interpreter and its compiler exclude each other in one
process, so tests compile in a child: see `compile_all`.
"""
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

# Multiprocessors, KiB of shared memory that one program may have, and what Triton calls the chip
CHIPS = {"sm_80": (108, 163, "cuda", 80, 32), "sm_90": (132, 227, "cuda", 90, 32),
         "gfx942": (304, 64, "hip", "gfx942", 64)}


def compile_all(test_module, function, chip):
    """Run tests/<test_module>.<function>() in a child that compiles, not launches -> list of `cost`."""
    env = os.environ | {"TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    argv = [sys.executable, __file__, test_module, function, chip]
    done = subprocess.run(argv, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def cost(built, chip):
    """Return what a compiled kernel needs: registers of a thread, bytes spilled per thread and shared.

    matrix: whether it multiplies half types; hgmma: whether it does so with what PTX calls wgmma.
    """
    asm = built.asm
    if "cubin" in asm:
        import triton
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(asm["cubin"])
            file.flush()
            tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
            usage = subprocess.check_output([tool, "--dump-resource-usage", file.name], text=True)
        spills, registers = r"STACK:(\d+)", r"REG:(\d+)"       # what is spilled goes to the stack
    else:
        usage = asm["amdgcn"]
        spills, registers = r"\.private_segment_fixed_size:\s+(\d+)", r"\.vgpr_count:\s+(\d+)"
    return {"name": built.name, "chip": chip, "shared": built.metadata.shared,
            "spills": int(re.search(spills, usage)[1]), "registers": int(re.search(registers, usage)[1]),
            "matrix": bool(re.search(r"tt\.dot .*f16", asm["ttir"])),
            "hgmma": "wgmma.mma_async" in asm.get("ptx", "")}


def record(function, chip):
    """Return what `function` launches, each different launch compiled once for `chip`."""
    import triton
    from kernels import decode, logits, tiles
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import JITFunction, create_function_from_signature
    multiprocessors, _, *target = CHIPS[chip]
    target, found = GPUTarget(*target), {}
    backend = make_backend(target)

    def run(self, *args, grid, warmup, **options):
        bind = create_function_from_signature(self.signature, self.params, backend)
        bound = bind(*args, **options)
        options, *launch = self._pack_args(backend, options, *bound)
        key = self.__name__, repr(launch), repr(options)
        if key not in found:
            built = triton.compile(ASTSource(self, *launch), target=target, options=vars(options))
            found[key] = cost(built, chip)

    with mock.patch.object(JITFunction, "run", run):
        for module in (decode, logits, tiles):
            module.chip = lambda device: (chip, multiprocessors)
        function()
    return list(found.values())


def check(result):
    """Hold a kernel to what is demanded of all.

    It may spill 16 registers: on an H100 a kernel that did so was faster than the next best that did not.
    """
    assert result["spills"] <= 64, result
    assert result["shared"] <= CHIPS[result["chip"]][1] * 1024, result
    assert result["hgmma"] or not result["matrix"] or result["chip"] != "sm_90", result


if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
    print(json.dumps(record(getattr(importlib.import_module(sys.argv[1]), sys.argv[2]), sys.argv[3])))
