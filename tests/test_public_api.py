"""The public names, and what the README and the package say about themselves."""

import importlib.metadata
import inspect
import re
import subprocess
from pathlib import Path

from typer.testing import CliRunner

import fedsa_kernels
import fedsa_secure
from fedsa_secure.cli import app
from fedsa_secure.methods import methods_table

ROOT = Path(__file__).parents[1]


def test_public_names() -> None:
    assert fedsa_secure.__all__ == [
        "AdapterError",
        "BudgetExceededError",
        "CheckpointError",
        "Client",
        "ConfigError",
        "DivergedError",
        "FedSAError",
        "MissingExtraError",
        "PrivacyError",
        "Run",
        "TrainConfig",
        "evaluate",
        "load",
        "resume",
        "train",
    ]
    assert fedsa_kernels.__all__ == [
        "KeystreamExhaustedError",
        "chacha20_words",
        "clipped_sum",
        "keep_mask",
        "layer_keys",
        "lora_linear",
        "lora_linears",
        "quantize_mask",
        "row_keys",
        "sample_grad",
        "sample_grad_with_norms",
        "squared_norms",
        "token_keys",
        "vera_linear",
    ]
    for name in fedsa_secure.__all__:
        assert inspect.getdoc(getattr(fedsa_secure, name)), name


def test_version_is_the_distributions_and_in_the_changelog() -> None:
    assert fedsa_secure.__version__ == importlib.metadata.version("fedsa-secure")
    changelog = (ROOT / "docs" / "changelog.md").read_text(encoding="utf-8")
    assert f"## {fedsa_secure.__version__}" in changelog


def test_the_readme_shows_every_source_file() -> None:
    tree = (ROOT / "README.md").read_text(encoding="utf-8")
    for package in ("fedsa_secure", "kernels/fedsa_kernels"):
        for path in (ROOT / package).rglob("*.py"):
            if path.name not in ("__init__.py", "__main__.py"):
                assert re.search(rf"^\s*{re.escape(path.name)}\s+\S", tree, re.M), path


def test_the_readme_shows_the_table_of_methods_that_the_code_has() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert methods_table() in readme
    shown = CliRunner().invoke(app, ["methods"])
    assert shown.stdout.strip() == methods_table()


def test_the_paper_index_points_at_files_that_exist() -> None:
    index = (ROOT / "docs" / "paper_index.md").read_text(encoding="utf-8")
    paths = re.findall(r"`((?:fedsa_secure|kernels|tests)/[\w/.]+\.py)`", index)
    assert paths
    for path in paths:
        assert (ROOT / path).is_file(), path


def test_top_level_is_as_agreed() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    top = {line.split("/")[0] for line in listed.stdout.splitlines()}
    expected = {
        "README.md",
        "benchmarks",
        "docs",
        "fedsa_secure",
        "kernels",
        "pyproject.toml",
        "tests",
    }
    assert {name for name in top if not name.startswith(".")} == expected
