"""The examples of the documents run."""

import os
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"


def test_private_example(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "private.py"), "--small"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert "is (ε_k, δ)-DP when one of its records is replaced by a null record" in done.stdout
    assert "over its lifetime budget of 10" in done.stdout
    assert not list(tmp_path.iterdir())  # everything it made was in a folder of its own
