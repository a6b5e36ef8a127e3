"""Findings as rows of a file and as points of a figure."""

from collections.abc import Sequence

from fedsa_secure.audit.bounds import Finding
from fedsa_secure.audit.noise import NoiseFinding
from fedsa_secure.reporting.audit import AuditPoint
from fedsa_secure.reporting.rows import Row

AnyFinding = Finding | NoiseFinding


def rows_of(findings: Sequence[AnyFinding]) -> list[Row]:
    """Three rows for each: of a claim ε claimed, proven, most provable; of noise its limits."""
    return [row for each in findings for row in _rows(each)]


def points_of(findings: Sequence[AnyFinding]) -> list[AuditPoint]:
    """Those that say something about ε."""
    return [
        AuditPoint(each.name, each.claimed, each.proven, each.most_provable)
        for each in findings
        if isinstance(each, Finding)
    ]


def _rows(finding: AnyFinding) -> list[Row]:
    if isinstance(finding, Finding):
        parts = {
            "claimed": finding.claimed,
            "proven": finding.proven,
            "most provable": finding.most_provable,
        }
        unit, n, measured, baseline = (
            f"ε at δ={finding.delta:g}",
            finding.trials,
            "proven",
            "claimed",
        )
    else:
        parts = {"least": finding.low, "measured": finding.value, "largest": finding.high}
        unit, n, measured, baseline = "1", finding.samples, "measured", "largest"
    rows = []
    for part, value in parts.items():
        compared = part == measured and parts[baseline] > 0
        rows.append(
            Row(
                name=f"{finding.name}: {part}",
                n=n,
                value=value,
                unit=unit,
                baseline=f"{finding.name}: {baseline}" if compared else None,
                ratio_to_baseline=value / parts[baseline] if compared else None,
            )
        )
    return rows
