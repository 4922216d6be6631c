"""Compile Triton kernels ahead of time, without a GPU, and read what they cost from the machine code.

A launcher is called as ever, but with meta tensors and with `JITFunction.run` replaced: each launch is compiled for the chip
asked for, specialised as the real one would be, and not run. So what is checked is what the launcher chooses, at the true sizes.
Triton's interpreter and its compiler exclude each other in one process, so tests compile in a child: see `compile_all`.
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

CHIPS = {"sm_80": ("cuda", 80, 32, 108), "sm_90": ("cuda", 90, 32, 132), "gfx942": ("hip", "gfx942", 64, 304)}
SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "gfx942": 64 * 1024}                     # bytes that one program may have
TYPES = {"float32": "*fp32", "float16": "*fp16", "bfloat16": "*bf16", "int64": "*i64", "int32": "*i32", "bool": "*i1", "uint8": "*u8"}


def compile_all(test_module, function, chip):
    """Run tests/<test_module>.<function>() in a child that compiles instead of launching -> list of what `compile` gives."""
    env = os.environ | {"TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, __file__, test_module, function, chip], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def compile(kernel, signature, constexprs, chip, options, aligned=()):
    """One kernel for one chip -> {name, chip, registers, shared, spills, matrix, hgmma}; spills in bytes a thread.

    signature: {argument: "*bf16", "i32", ... or "constexpr"}; constexprs: {argument: value}; aligned: names of arguments that
    are multiples of 16 (pointers and strides), which the runtime would see; options: num_warps, num_stages.
    matrix in the answer: it multiplies half types.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    attrs = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    options = {"num_warps": 4, "num_stages": 2 if chip.startswith("gfx") else 3} | options   # the runtime's own defaults
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attrs)
    built = triton.compile(source, target=GPUTarget(*CHIPS[chip][:3]), options=options)
    read = read_amd if chip.startswith("gfx") else read_nvidia
    return {"name": kernel.__name__, "chip": chip, **options, "shared": built.metadata.shared,
            "matrix": bool(re.search(r"tt\.dot .*f16", built.asm["ttir"])), **read(built.asm),
            "constexprs": {name: str(value) for name, value in constexprs.items()}}


def read_nvidia(asm):
    """Registers and stack, where what is spilled goes, from the cubin's resource table; HGMMA is what PTX calls wgmma."""
    import triton
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        usage = subprocess.check_output([tool, "--dump-resource-usage", file.name], text=True)
    stack, registers = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("STACK", "REG"))
    return {"registers": registers, "spills": stack, "hgmma": "wgmma.mma_async" in asm["ptx"]}


def read_amd(asm):
    scratch, registers = (int(re.search(rf"\.{key}:\s+(\d+)", asm["amdgcn"])[1]) for key in ("private_segment_fixed_size", "vgpr_count"))
    return {"registers": registers, "spills": scratch, "hgmma": False}


def specialise(kernel, chip, arguments):
    """A launch's arguments -> those of `compile`: types, constants and alignments, as triton's runtime takes them."""
    signature, constexprs, aligned = {}, {}, []
    options = {name: arguments[name] for name in arguments.keys() - set(kernel.arg_names)}
    for parameter in kernel.params:
        name = parameter.name
        value = arguments[name] if name in arguments else parameter.default
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1 and not parameter.do_not_specialize):
            signature[name], constexprs[name] = "constexpr", value
        elif hasattr(value, "stride"):
            signature[name] = TYPES[str(value.dtype).removeprefix("torch.")]
            if value.storage_offset() * value.element_size() % 16 == 0:
                aligned.append(name)
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if -2**31 <= value < 2**31 else "i64"
            if value % 16 == 0 and not parameter.do_not_specialize:
                aligned.append(name)
    return kernel, signature, constexprs, chip, options, aligned


def record(function, chip):
    """What `function` launches, each different launch compiled once for `chip`."""
    from triton.runtime import JITFunction
    found = {}

    def run(self, *args, grid, warmup, **kwargs):
        launch = specialise(self, chip, dict(zip(self.arg_names, args)) | kwargs)
        if repr(launch) not in found:
            found[repr(launch)] = compile(*launch)

    with mock.patch.object(JITFunction, "run", run):
        for module in [m for name, m in sys.modules.items() if name.startswith("kernels") and hasattr(m, "chip")]:
            module.chip = lambda device: (chip, CHIPS[chip][3])
        function()
    return list(found.values())


def check(result):
    """The demands on every kernel."""
    assert result["spills"] == 0, result
    assert result["shared"] <= SHARED[result["chip"]], result
    assert result["hgmma"] or not result["matrix"] or result["chip"] != "sm_90", result


if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
    print(json.dumps(record(getattr(importlib.import_module(sys.argv[1]), sys.argv[2]), sys.argv[3])))
