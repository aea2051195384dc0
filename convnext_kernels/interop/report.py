"""`acceleration_report`: what `accelerate` did to a model, or would do."""

from dataclasses import dataclass

from torch import nn

from convnext_kernels.interop.adapter import BACKEND, Adapter
from convnext_kernels.interop.swap import check_model
from convnext_kernels.interop.table import OWN, Finding, find


@dataclass(frozen=True)
class ReportRow:
    """One module that is replaced, could be replaced, or cannot be replaced."""

    name: str  # as in ``model.named_modules()``; empty for the model itself
    type: str  # the original class
    kind: str  # "block", "downsampling", "layer norm", "group norm" or "depthwise convolution"
    replaced: bool
    reason: str  # by what it was replaced, or why not
    replaceable: bool = False  # whether it is replaced, or would be by `accelerate`
    fused: bool = False  # whether this package's kernels compute it: replaced, or a module of this package


@dataclass(frozen=True)
class AccelerationReport:
    """What `acceleration_report` returns; ``str()`` makes a table."""

    rows: tuple[ReportRow, ...]

    @property
    def replaced(self) -> int:
        """Count the rows that are replaced."""
        return sum(row.replaced for row in self.rows)

    def __str__(self) -> str:
        if not self.rows:
            return "no ConvNeXt block, downsampling or LayerNorm over channels found"
        table = [("module", "type", "replaced", "by what, or why not")]
        table += [(r.name or "(the model)", r.type, "yes" if r.replaced else "no", r.reason) for r in self.rows]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = ["  ".join(f"{c:<{w}}" for c, w in zip(line, widths, strict=True)).rstrip() for line in table]
        own = sum(row.fused and not row.replaced for row in self.rows)
        also = f", {own} already of this package" if own else ""
        return "\n".join([*lines, f"{self.replaced} of {len(self.rows)} replaced{also}"])


def _row(finding: Finding) -> ReportRow:
    name, module, accelerated, refusal = finding
    if accelerated is None:
        kind = next(kind for own, kind in OWN.items() if isinstance(module, own))
        return ReportRow(name, type(module).__name__, kind, False, f"already a fused {kind}", fused=True)
    replaced = isinstance(module, Adapter)
    reason = refusal or "can be replaced: call accelerate(model)"
    if replaced:
        reason = f"fused {accelerated.kind}, backend {getattr(module, BACKEND)}"
        if refusal:
            reason += f"; runs the original forward for now: {refusal}"
    original = accelerated.original if replaced else type(module)
    return ReportRow(name, original.__name__, accelerated.kind, replaced, reason, replaced or not refusal, replaced)


def acceleration_report(model: nn.Module) -> AccelerationReport:
    """Report for each block, downsampling and LayerNorm over channels of `model` whether it is replaced, and why.

    Modules of this package are listed too. The inner modules of a replaced module are not listed.

    Raises TypeError when `model` is not a module.
    """
    check_model(model)
    return AccelerationReport(tuple(map(_row, find(model))))
