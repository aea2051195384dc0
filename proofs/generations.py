"""One table of the Triton kernels before and after their second generation, from the records.

    python proofs/generations.py

Before: the records of commit BEFORE, read from git; now: those of this checkout. All of sm_90. Bytes per pixel and
executed PTX are counted (`triton_executed.py`), SASS instructions and registers are those of the compiled kernels
(`triton_static.py`), from the least to the most over the configurations that are recorded for these channels.
"""

import json
import re
import subprocess
from typing import NamedTuple

import click
from checkout import RECORDS, ROOT
from cubin import span

from convnext_kernels.backends.triton.plans.dwconv_plan import taps_inside

BEFORE = "d222214"
ARCH = "90"
REGISTERS, INSTRUCTIONS = 3, 11  # places in a line of triton_kernels.json


class Row(NamedTuple):
    """A case: the start of its label in triton_counts.md, what its kernels' specialisations contain, the kernels."""

    case: str
    dtype: str
    figures: tuple[str, str]  # before, now
    holds: tuple[str, ...]
    kernels: tuple[str, str]  # before, now; separated by spaces


def _rows() -> list[Row]:
    rows = []
    for c, size, forward in ((96, 28, "rolling"), (384, 14, "rolling"), (768, 7, "plane")):
        for what, kernel, flip in (
            ("forward", forward, "=False"),
            ("dgrad", forward, "=True"),
            ("wgrad", "partials", ""),
        ):
            case = f"dwconv 7x7 C{c} {size}x{size}"
            holds = f"C={c} ", "KH=7 ", f"FLIP{flip}" if flip else ""
            rows.append(Row(f"{case} {what}", "bf16", (f"{case} bf16 sm_90 {what}",) * 2, holds, (kernel,) * 2))
    for k in (13, 31):
        for what, kernel, now in (
            ("forward", "rows", "toeplitz"),
            ("dgrad", "rows", "toeplitz"),
            ("wgrad", "partials", "toeplitz_partials"),
        ):
            labels = tuple(f"dwconv {k}x{k} C{c} 28x28 bf16 sm_90 {what}" for c in (96, 8))
            rows.append(Row(f"dwconv {k}x{k} 28x28 {what}", "bf16", labels, (f"KH={k} ",), (kernel, now)))
    for c, size, old, now in (
        (96, 28, "mlp_fused_fwd", "mlp_fused_fwd"),
        (384, 14, "mlp_expand mlp_project", "mlp_expand mlp_folded_expand mlp_project"),
    ):
        label = f"block C{c} {size}x{size} V1 bf16 sm_90"
        rows.append(
            Row(f"block C{c} {size}x{size} forward, mlp's kernels", "bf16", (label,) * 2, (f" C={c} ",), (old, now))
        )
    separate = "mlp_hidden_gradient mlp_input_gradient mlp_weight_gradient"
    for c, plan, now in (
        (96, "recomputed", "mlp_data_gradient mlp_recomputed_weight_gradient"),
        (192, "fused", "mlp_data_gradient mlp_weight_gradient"),
    ):
        labels = (f"gradients of mlp, plan {p}, C{c} 14x14 V1 bf16" for p in ("gemm", plan))
        rows.append(Row(f"mlp C{c} gradients, {plan}", "bf16", tuple(labels), (f"={c} ",), (separate, now)))
    return rows


class Records(NamedTuple):
    """The two records of one state of the repository."""

    counts: str
    kernels: dict

    def figure(self, label: str, what: str) -> float | None:
        """The counted value of the first line that begins so and has `what`."""
        found = re.search(rf"^\| {re.escape(label)}[^|]*: {what}[^|]*\| ([\d.]+)", self.counts, re.MULTILINE)
        return float(found[1]) if found else None

    def instructions(self, label: str) -> float | None:
        """Executed PTX instructions per 32 outputs."""
        found = self.figure(label, "PTX per 32")
        per_tap = self.figure(label, "PTX per tap")
        if found is not None or per_tap is None:
            return found
        k, size = (int(number) for number in re.search(r"dwconv (\d+)x.* (\d+)x", label).groups())
        return per_tap * (taps_inside(size, k, 1) / size) ** 2

    def static(self, kernels: str, holds: tuple[str, ...], dtype: str, place: int) -> str:
        """The span of a value of the compiled kernels, one kernel after another."""
        spans = []
        for kernel in kernels.split():
            values = [
                compiled[ARCH][place]
                for name, compiled in self.kernels.get(f"{kernel}_kernel", {}).items()
                if ARCH in compiled and all(held in name for held in holds) and re.search(rf"^\w+:{dtype},", name)
            ]
            spans += [span(values)] if values else []
        return ", ".join(spans) or "-"


def _before(file: str) -> str:
    run = ["git", "-C", str(ROOT), "show", f"{BEFORE}:proofs/records/{file}"]
    return subprocess.run(run, capture_output=True, text=True, check=True).stdout


@click.command(help=__doc__.splitlines()[0])
def main() -> None:
    """Print the table in Markdown."""
    counts, kernels = "triton_counts.md", "triton_kernels.json"
    now = Records((RECORDS / counts).read_text(), json.loads((RECORDS / kernels).read_text())["kernels"])
    before = Records(_before(counts), json.loads(_before(kernels))["kernels"])
    print("| kernel | dtype | bytes per pixel | PTX per 32 outputs | SASS | registers |")
    print("|---|---|---|---|---|---|")
    for row in _rows():
        pairs = []
        old, new = row.figures
        # A plan of separate products is the first generation's
        old_bytes = (now if "plan gemm" in old else before).figure(old, "bytes per pixel")
        pairs.append([f"{v:.4g} C" if v else "-" for v in (old_bytes, now.figure(new, "bytes per pixel"))])
        pairs.append([f"{v:.3g}" if v else "-" for v in (before.instructions(old), now.instructions(new))])
        for place in (INSTRUCTIONS, REGISTERS):
            pairs.append(
                [r.static(k, row.holds, row.dtype, place) for r, k in zip((before, now), row.kernels, strict=True)]
            )
        cells = [a if a == b else f"{a} → {b}" for a, b in pairs]
        print(f"| {row.case} | {row.dtype} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
