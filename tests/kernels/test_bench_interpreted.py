"""A dry run of what a GPU would do: check, tune, time, and a table that the dispatcher reads."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fedsa_kernels import dispatch
from fedsa_kernels.bench import plan_for, run
from fedsa_kernels.launch import interpreted

pytestmark = pytest.mark.skipif(not interpreted(), reason="needs TRITON_INTERPRET=1")


def test_a_dry_run_checks_tunes_and_times_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDSA_KERNEL_TABLE", "")  # what the run puts in force ends with the test
    plan = plan_for(torch.device("cpu"))
    plan = replace(plan, shapes=plan.shapes[1:], checked=plan.checked[1:], turns=2)
    kept = []
    table = tmp_path / "table.json"
    findings = run(plan, torch.device("cpu"), table, lambda _: None, 11, kept.append)
    assert all(check.passed for check in findings.checks)
    assert {check.order for check in findings.checks} >= {"reference", "cublas", "fused", "peft"}
    assert [t for part in kept for t in part.timings] == findings.timings
    for shape in plan.shapes:
        timed = {t.order: t.times.p50 for t in findings.timings if t.shape == shape}
        assert set(timed) >= {"frozen", "peft", "reference", "cublas", "fused"}
        ours = {name: timed[name] for name in dispatch.BACKENDS}
        monkeypatch.setattr(dispatch, "device_name", lambda device: "any")
        choice = dispatch.choose(shape.problem, torch.device("cuda"))
        assert choice.backend == min(ours, key=ours.get)
