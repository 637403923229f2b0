"""Every kernel configuration a launcher can choose compiles for each card, without a GPU.

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
             nearest="*fp32", done="*i32", dist2="*fp32", index="*i64", source="*i64",
             weight="*fp32", ends="*i64", depth="*fp32", B="i32", N="i32", M="i32", m="i32",
             k="i32", tiles="i32", T="i32", C="i32", turn="i32", H="i32", W="i32", height="i32",
             width="i32", radius="fp32", radius2="fp32", total="i64", table="*i32", rows="*i32",
             parts="i32", K="i32")
CARDS = (80, 86, 89, 90, 100, 120)  # A100, RTX 30xx, RTX 40xx, H100, B200, RTX 50xx


def configurations():
    """(name, kernel, argument types, constexpr and options) of all the launchers can choose."""
    fps, knn, ball, interpolate, splat, sparse = (
        importlib.import_module(f"kernels.{name}")
        for name in ("fps", "knn", "ball_query", "interpolate", "splat", "sparse_conv"))
    sizes = [2 ** i + j for i in range(21) for j in (0, 1)]
    for block, warps in fps.IN_REGISTERS:
        yield "fps_registers", fps._fps_registers, TYPES, dict(BLOCK=block, num_warps=warps)
    chosen = {str(c): c for N in sizes if N > fps.IN_REGISTERS[-1][0] for c in [fps.shares(N)]}
    for config in chosen.values():
        yield "fps_round", fps._fps_round, TYPES, config
    block, warps = fps.STREAMED
    yield "fps_rest", fps._fps_rest, TYPES, dict(BLOCK=block, num_warps=warps)
    chosen = {str(c): c for k in range(1, knn.MAX_K + 1) for c in [knn.blocks(k)]}
    for config in chosen.values():
        yield "knn", knn._knn, TYPES, config
    yield "ball_query", ball._ball_query, TYPES, ball.BLOCKS
    chosen = {str(c): c for c in map(interpolate.blocks, sizes)}
    for forward, backward in chosen.values():
        for dtype in ("*fp32", "*bf16", "*fp16"):
            for C in ("i32", "i32 % 16"):  # a launch specialises on C % 16 == 0: wider loads
                types = dict(TYPES, feats=dtype, grad=dtype, out=dtype, C=C)
                name = f"{dtype}, C {C}"
                yield f"interpolate_forward {name}", interpolate._forward, types, forward
                yield f"interpolate_backward {name}", interpolate._backward, types, backward
    chosen = {str(c): c for c in map(splat.blocks, sizes)}
    for config in chosen.values():
        yield "splat", splat._splat, TYPES, config
    yield "splat_unpack", splat._unpack, TYPES, splat.UNPACK
    for dtype, size in (("*fp32", 4), ("*bf16", 2)):  # the stem, blocks, the head: all sizes
        for C, D in ((16, 64), (64, 64), (256, 256), (416, 32), (416, 416)):    # multiples of 16
            types = dict(TYPES, feats=dtype, weight=dtype, grad=dtype, out=dtype, C="i32 % 16",
                         D="i32 % 16")
            forward, backward = sparse.blocks(C, D, size)
            yield f"sparse_conv {dtype}, {C} {D}", sparse._convolve, types, forward
            yield (f"sparse_conv_weights {dtype}, {C} {D}", sparse._weight_gradient,
                   dict(types, out="*fp32"), backward)


def compile_kernel(kernel, types, config, sm):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    config = dict(config)
    options = dict(enable_fp_fusion=False)
    if "num_warps" in config:
        options["num_warps"] = config.pop("num_warps")
    kinds = {name: "constexpr" if name in config else types[name] for name in kernel.arg_names}
    signature = {name: kind.removesuffix(" % 16") for name, kind in kinds.items()}
    # torch aligns memory to 16 bytes; a launch specialises on that
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(kinds.values())
               if kind.startswith("*") or kind.endswith(" % 16")}
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
    # FFMA2 is Blackwell's pair of FFMA
    fused = re.findall(r"\bfma\.rn", built.asm["ptx"]) + re.findall(r"\bFFMA2?\b", code)
    return dict(sm=sm, registers=int(re.search(r"REG:(\d+)", usage)[1]),
                shared=built.metadata.shared, stack=int(re.search(r"STACK:(\d+)", usage)[1]),
                spills=len(re.findall(r"\b(?:LDL|STL)\b", code)),
                instructions=code.count(";"), fused=len(fused),
                tensor_cores=bool(re.search(r"\bmma\.|\bwgmma\.|\btcgen05\.mma", built.asm["ptx"])))


def main(share=0, shares=1):
    sys.path.insert(0, str(ROOT))
    built, jobs = set(), []
    for name, kernel, types, config in configurations():
        # the instruction sets of sm_86 and sm_89 are sm_80's: there one configuration is enough
        cards = [sm for sm in CARDS if sm not in (86, 89) or kernel not in built]
        built.add(kernel)
        jobs += [(name, kernel, types, config, sm) for sm in cards]
    for name, kernel, types, config, sm in jobs[share::shares]:
        row = dict(kernel=name, config=config)
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
    shares = os.cpu_count()
    runs = [subprocess.Popen([sys.executable, __file__, str(share), str(shares)], env=environment,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            for share in range(shares)]
    rows = []
    for run in runs:
        out, err = run.communicate()
        assert run.returncode == 0, err[-3000:]
        rows += [json.loads(line) for line in out.splitlines()]
    return rows


def test_every_kernel_configuration_compiles_for_every_card(table):
    assert not [row for row in table if "error" in row]
    names = {row["kernel"].split()[0] for row in table}
    assert names == {"fps_registers", "fps_round", "fps_rest", "knn", "ball_query",
                     "interpolate_forward", "interpolate_backward", "splat", "splat_unpack",
                     "sparse_conv", "sparse_conv_weights"}
    assert {(row["kernel"].split()[0], row["sm"]) for row in table} == {
        (name, sm) for name in names for sm in CARDS}


def test_no_kernel_spills_registers(table):
    # but for one value that the compiler of sm_120 puts on the stack
    assert not [row for row in table if row["stack"] > 8 * (row["sm"] == 120)
                or row["spills"] > 2 * (row["sm"] == 120)]


def test_no_multiply_add_is_fused(table):
    # but in products of matrices: they decide no neighbour
    assert not [row for row in table if row["fused"] and "sparse_conv" not in row["kernel"]]


def test_products_of_half_precision_run_on_tensor_cores_and_those_of_fp32_do_not(table):
    rows = [row for row in table if row["kernel"].startswith("sparse_conv")]
    assert {row["tensor_cores"] for row in rows if "*fp32" in row["kernel"]} == {False}  # no TF32
    assert {row["tensor_cores"] for row in rows if "*fp32" not in row["kernel"]} == {True}


def test_every_kernel_fits_the_register_file_and_the_shared_memory_of_any_card(table):
    assert not [row for row in table if row["registers"] * 32 * row["config"]["num_warps"] > 65536
                or row["shared"] > 48 * 1024]


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
