"""What every benchmark writes beside its numbers: versions, machine, commit."""

import csv
import importlib.metadata
import os
import platform
import shutil
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


def environment() -> dict[str, str]:
    """Versions, device and commit of this run."""
    packages = ("torch", "transformers", "peft")
    return {
        "device": device(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
        "commit": commit(),
        "date": datetime.now(UTC).date().isoformat(),
    }


def device() -> str:
    """The GPU, or else the processor's model, whose linear algebra differs, and its threads."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    from cpuinfo import get_cpu_info  # machines that have a GPU do without

    return f"{get_cpu_info()['brand_raw']}, {torch.get_num_threads()} threads"


def commit() -> str:
    """The commit that is measured; ``+`` marks uncommitted changes of code.

    Where the code lies without its history, FEDSA_COMMIT says which one it is.
    """
    if "FEDSA_COMMIT" in os.environ:
        return os.environ["FEDSA_COMMIT"]
    if shutil.which("git") is None:
        return "unknown"
    root = Path(__file__).parent

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True)
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--", "../fedsa_secure", "../kernels", "*.py")
    return (git("rev-parse", "--short", "HEAD") or "unknown") + ("+" if changed else "")


def append_row(path: Path, row: dict[str, object]) -> None:
    """Add one row to a CSV file, with a header if the file is new."""
    new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(row))
        if new:
            writer.writeheader()
        writer.writerow(row)
        file.flush()
        os.fsync(file.fileno())


def read_rows(path: Path) -> list[dict[str, str]]:
    """All rows of a CSV file; none if it does not exist."""
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def write_block(path: Path, name: str, text: str) -> None:
    """Replace what stands between the marks of this name in a Markdown file."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, _, rest = path.read_text(encoding="utf-8").partition(begin)
    _, _, after = rest.partition(end)
    path.write_text(f"{before}{begin}\n{text}\n{end}{after}", encoding="utf-8")
