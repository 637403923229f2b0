"""Every kernel configuration a launcher can choose compiles for sm_80 and sm_90, without a GPU.

Triton ships ptxas and disassemblers, so a machine without a card can detect a kernel that no longer
builds, spills registers, or fuses a multiply-add, which could change a nearest neighbour.

    python tests/test_kernels_compile.py        prints registers, stack and spills of each of them
"""
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TYPES = dict(xyz="*fp32", query="*fp32", points="*fp32", start="*i64", lengths="*i64", mail="*i64",
             nearest="*fp32", dist2="*fp32", index="*i64", source="*i64", weight="*fp32",
             ends="*i64", N="i32", M="i32", m="i32", k="i32", tiles="i32", T="i32", C="i32",
             first="i32", depth="*fp32", H="i32", W="i32", height="i32", width="i32", radius="fp32",
             radius2="fp32", total="i64")


def configurations():
    """(name, kernel, argument types, constexpr and options) of all the launchers can choose."""
    fps, knn, interpolate, splat = (importlib.import_module(f"kernels.{name}")
                                    for name in ("fps", "knn", "interpolate", "splat"))
    sizes = [2 ** i + j for i in range(21) for j in (0, 1)]
    for block, warps in fps.IN_REGISTERS:
        yield "fps_registers", fps._fps_registers, TYPES, dict(BLOCK=block, num_warps=warps)
    chosen = {str(c): c for N in sizes if N > fps.IN_REGISTERS[-1][0] for c in [fps.shares(N)]}
    for config in chosen.values():
        if config["PROGRAMS"] <= 128:  # no card has more multiprocessors
            config = dict(config, launch_cooperative_grid=True)
            yield "fps_together", fps._fps_together, TYPES, config
    block, warps = fps.STREAMED
    yield "fps_stream", fps._fps_stream, TYPES, dict(BLOCK=block, num_warps=warps)
    chosen = {str(c): c for N in sizes for k in range(1, knn.MAX_K + 1) for c in [knn.blocks(N, k)]}
    for config in chosen.values():
        yield "knn", knn._knn, TYPES, config
    chosen = {str(c): c for c in map(interpolate.blocks, sizes)}
    for forward, backward in chosen.values():
        for dtype in ("*fp32", "*bf16", "*fp16"):
            types = dict(TYPES, feats=dtype, grad=dtype, out=dtype)
            yield f"interpolate_forward {dtype}", interpolate._forward, types, forward
            yield f"interpolate_backward {dtype}", interpolate._backward, types, backward
    chosen = {str(c): c for c in map(splat.blocks, sizes)}
    for config in chosen.values():
        yield "splat", splat._splat, TYPES, config
    yield "splat_unpack", splat._unpack, TYPES, splat.UNPACK


def compile_kernel(kernel, types, config, sm):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    config = dict(config)
    options = dict(enable_fp_fusion=False)
    for name in ("num_warps", "launch_cooperative_grid"):
        if name in config:
            options[name] = config.pop(name)
    signature = {name: "constexpr" if name in config else types[name] for name in kernel.arg_names}
    # torch aligns memory to 16 bytes; a launch specialises on that
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(signature)
               if signature[name].startswith("*")}
    source = ASTSource(kernel, signature, constexprs=config, attrs=aligned)
    built = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        usage = subprocess.run([tools / "cuobjdump", "--dump-resource-usage", file.name],
                               capture_output=True, text=True, check=True).stdout
        code = subprocess.run([tools / "nvdisasm", "-c", file.name], capture_output=True, text=True,
                              check=True).stdout
    fused = re.findall(r"\bfma\.rn", built.asm["ptx"]) + re.findall(r"\bFFMA\b", code)
    return dict(sm=sm, registers=int(re.search(r"REG:(\d+)", usage)[1]),
                shared=built.metadata.shared, stack=int(re.search(r"STACK:(\d+)", usage)[1]),
                spills=len(re.findall(r"\b(?:LDL|STL)\b", code)),
                instructions=code.count(";"), fused=len(fused))


def main():
    sys.path.insert(0, str(ROOT))
    for name, kernel, types, config in configurations():
        for sm in (80, 90):
            row = dict(kernel=name, config={c: v for c, v in config.items()})
            try:
                row.update(compile_kernel(kernel, types, config, sm))
            except Exception as error:  # the other kernels are still reported
                row.update(sm=sm, error=f"{type(error).__name__}: {error}"[:2000])
            print(json.dumps(row), flush=True)


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    triton = pytest.importorskip("triton", reason="needs triton: compiles its kernels")
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 3):
        pytest.skip(f"triton {triton.__version__} compiles without a GPU through another interface")
    environment = dict(os.environ)
    environment.pop("TRITON_INTERPRET", None)  # it would turn compilation off
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))  # an empty cache
    run = subprocess.run([sys.executable, __file__], env=environment, capture_output=True,
                         text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


def test_every_kernel_configuration_compiles_for_sm_80_and_sm_90(table):
    assert not [row for row in table if "error" in row]
    assert {row["sm"] for row in table} == {80, 90}
    names = {row["kernel"].split()[0] for row in table}
    assert names == {"fps_registers", "fps_together", "fps_stream", "knn", "interpolate_forward",
                     "interpolate_backward", "splat", "splat_unpack"}


def test_no_kernel_spills_registers(table):
    assert not [row for row in table if row["stack"] or row["spills"]]


def test_no_multiply_add_is_fused(table):
    assert not [row for row in table if row["fused"]]


def test_every_kernel_fits_the_register_file_and_the_shared_memory_of_any_card(table):
    assert not [row for row in table if row["registers"] * 32 * row["config"]["num_warps"] > 65536
                or row["shared"] > 48 * 1024]


if __name__ == "__main__":
    main()
