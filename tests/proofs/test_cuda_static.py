"""The static report of the CUDA extension: names, the record, the table in docs/, and what fails the check."""

import importlib
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

PROOFS = Path(__file__).resolve().parents[2] / "proofs"
# A kernel that keeps an array in local memory, which is a stack, and one that has a loop.
PTX = """
.version 7.5
.target sm_80
.address_size 64
.visible .entry _ZN3cnk4cuda5stackIfEEvNS0_6ParamsE(.param .u64 p) {
  .local .align 4 .b8 array[64];
  .reg .b64 %rd<4>;
  .reg .b32 %r<4>;
  ld.param.u64 %rd1, [p];
  mov.u64 %rd2, array;
  ld.global.u32 %r1, [%rd1];
  st.local.u32 [%rd2+4], %r1;
  cvt.u64.u32 %rd3, %r1;
  add.u64 %rd3, %rd3, %rd2;
  ld.local.u32 %r2, [%rd3];
  st.global.u32 [%rd1], %r2;
  ret;
}
.visible .entry _ZN3cnk4cuda4loopINS_8BFloat16ELi7EEEvNS0_6ParamsE(.param .u64 p) {
  .reg .b64 %rd<2>;
  .reg .b32 %r<3>;
  .reg .f32 %f<3>;
  .reg .pred %q;
  ld.param.u64 %rd1, [p];
  ld.global.u32 %r1, [%rd1];
  ld.global.f32 %f1, [%rd1+4];
again:
  ld.global.f32 %f2, [%rd1+8];
  fma.rn.f32 %f1, %f1, %f2, %f2;
  st.global.f32 [%rd1+4], %f1;
  sub.u32 %r1, %r1, 1;
  setp.ne.u32 %q, %r1, 0;
  @%q bra again;
  ret;
}
"""


@pytest.fixture(scope="module")
def report():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(PROOFS))
        yield importlib.import_module("cuda_static")


@pytest.fixture
def record(report):
    row = report.Row("one_kernel<bf16, 7>", 80, 40, 0, 0, 0, 0, 200, 0.5, {"HMMA": 4})
    rows = [row, replace(row, arch=90, registers=48), replace(row, kernel="one_kernel<fp32, 7>", tensor={})]
    rows += [replace(row, kernel="two_kernel", registers=20, tensor={})]
    return report.Record("13.0.88", {row.key: row for row in sorted(rows, key=lambda row: row.key)})


@pytest.mark.parametrize(
    ("symbol", "name"),
    [
        ("_ZN3cnk4cuda13dwconv_kernelINS_8BFloat16ELi7EEEvNS0_12DwconvParamsE", "dwconv_kernel<bf16, 7>"),
        ("_ZN3cnk4cuda11gelu_kernelINS_7Float16EEEvNS0_10GeluParamsE", "gelu_kernel<fp16>"),
        ("_ZN3cnk4cuda1kIfLb1ELNS0_6AccessE2EEEvNS0_1PE", "k<fp32, true, (Access)2>"),
        ("_ZN3cnk4cuda19sum_partials_kernelENS0_17SumPartialsParamsE", "sum_partials_kernel"),
        ("_ZN3cnk4cuda12_GLOBAL__N_112empty_kernelEv", "empty_kernel"),
        ("no_cpp", "no_cpp"),
    ],
)
def test_short_names(report, symbol, name):
    assert report.short(symbol) == name


def test_kernels_of_a_cubin(report, tmp_path):
    try:
        ptxas = report.cubin.tool("ptxas")
        report.cubin.tool("cuobjdump")
    except RuntimeError as error:
        pytest.skip(str(error))
    (tmp_path / "two.ptx").write_text(PTX)
    subprocess.run([ptxas, "-arch=sm_80", tmp_path / "two.ptx", "-o", tmp_path / "two.cubin"], check=True)
    rows = {row.kernel: row for row in report.rows_of(tmp_path / "two.cubin", 80)}
    assert sorted(rows) == ["loop<bf16, 7>", "stack<fp32>"]
    stack, loop = rows["stack<fp32>"], rows["loop<bf16, 7>"]
    assert (stack.stack, stack.spill_stores, stack.spill_loads, stack.loop_ffma) == (64, 4, 4, 0)
    assert (loop.stack, loop.spills) == (0, 0)
    assert 0 < loop.loop_ffma < 0.5
    assert min(row.instructions for row in rows.values()) > 5
    assert report.unexcused({row.key: row for row in rows.values()}) == [
        "stack<fp32> sm_80: 64 bytes of stack, spills of 4 + 4 bytes"
    ]


def test_record_and_table(report, record, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "RECORD", tmp_path / "kernels.json")
    monkeypatch.setattr(report, "PAGE", tmp_path / "kernels.md")
    (tmp_path / "kernels.md").write_text("# Kernels\n\nProse.\n")
    report.write(record)
    assert report.read(tmp_path / "kernels.json") == record
    text = (tmp_path / "kernels.md").read_text()
    assert text.startswith(f"# Kernels\n\nProse.\n\n{report.TITLE}\n")
    assert "| kernel | instances | sm_80 | sm_90 | spills |" in text
    assert "| one_kernel | 2 | 40 | 48 | 0 |" in text
    assert "| two_kernel | 1 | 20 | - | 0 |" in text
    report.write(record)
    assert (tmp_path / "kernels.md").read_text() == text  # nothing is appended twice
    (tmp_path / "kernels.md").write_text(text + "\nMore prose.\n")
    report.write(record)
    assert (tmp_path / "kernels.md").read_text() == text + "\nMore prose.\n"
    with pytest.raises(ValueError, match="expected one"):
        report.with_table(text + text, record)


def test_an_equal_extension_passes(report, record):
    failures, said = report.check(record.rows, "13.0.88", record)
    assert failures == []
    assert said[0].endswith("4 kernels on sm_80, sm_90")
    assert said[1] == "registers as recorded: 4 of 4 kernels"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"stack": 8}, "one_kernel<bf16, 7> sm_80: 8 bytes of stack"),
        ({"spill_loads": 4}, "one_kernel<bf16, 7> sm_80: 0 bytes of stack, spills of 0 + 4 bytes"),
        ({"tensor": {}}, "one_kernel<bf16, 7> sm_80: no tensor-core instruction, recorded HMMA"),
        ({"kernel": "three_kernel"}, "three_kernel sm_80: not in the record"),
        ({"arch": 86}, "one_kernel<bf16, 7> sm_80: in the record, but not in the extension"),
    ],
)
def test_a_worse_extension_fails(report, record, change, reason):
    first = record.rows["one_kernel<bf16, 7> sm_80"]
    rows = [replace(row, **change) if row is first else row for row in record.rows.values()]
    failures, _ = report.check({row.key: row for row in rows}, "13.0.88", record)
    assert any(line.startswith(reason) for line in failures), failures


def test_other_registers_are_said(report, record):
    rows = {key: replace(row, registers=99) for key, row in record.rows.items()}
    failures, said = report.check(rows, "13.0.88", record)
    assert failures == []
    assert sum("99 registers, recorded" in line for line in said) == 4
    assert said[-1] == "registers as recorded: 0 of 4 kernels"


def test_another_toolkit_may_have_other_registers(report, record):
    rows = {key: replace(row, registers=99) for key, row in record.rows.items()}
    failures, said = report.check(rows, "12.9.86", record)
    assert failures == []
    assert said[1] == "registers not compared: compiled by CUDA 12.9.86, recorded from 13.0.88"


@pytest.mark.parametrize("name", ["one_kernel<bf16, 7>", "one_kernel<bf16, 7> sm_80"])
def test_an_excuse(report, record, name, monkeypatch):
    monkeypatch.setitem(report.EXCUSED, name, "for this test")
    rows = dict(record.rows)
    for key in ("one_kernel<bf16, 7> sm_80", "one_kernel<bf16, 7> sm_90"):
        rows[key] = replace(rows[key], stack=8)
    left = [] if name == "one_kernel<bf16, 7>" else ["one_kernel<bf16, 7> sm_90"]
    assert [line.split(":")[0] for line in report.check(rows, "13.0.88", record)[0]] == left


def test_the_shipped_record_has_no_spills(report):
    """What docs/ says is free of spills, or excused, and the table there is that of the record."""
    record = report.read(report.RECORD)
    if record is None:
        pytest.skip("nothing is recorded yet")
    assert report.unexcused(record.rows) == []
    text = report.PAGE.read_text(encoding="utf-8")
    assert report.with_table(text, record) == text
