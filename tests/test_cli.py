"""The command line: what it says, and how it refuses bad input."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict
from rich.console import Console

from fedsa_secure import cli
from fedsa_secure.cli import terminal
from fedsa_secure.config import TrainConfig
from fedsa_secure.secagg import load_roster

SMALL = {
    "clients": 3,
    "rounds": 2,
    "local_steps": 2,
    "batch_size": 4,
    "max_length": 16,
    "rank": 2,
    "common_rows": 0,
}


@dataclass
class Outcome:
    status: int
    out: str
    error: str


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path) -> Callable[..., Outcome]:
    """`call("train", "--rank", "4")` as if typed in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["fedsa-secure", *arguments])
        # The consoles look up the streams that pytest has put in place.
        monkeypatch.setattr(terminal, "console", Console(width=100))
        capsys.readouterr()  # what was printed while the files were made
        status: Any = 0
        try:
            cli.main()
        except SystemExit as end:
            status = end.code
        captured = capsys.readouterr()
        return Outcome(int(status or 0), captured.out, captured.err)

    return run


@pytest.fixture
def folders(tiny_bert: Any, tiny_tokenizer: Any, small_dataset: Any, tmp_path: Path) -> list[str]:
    """Options of a small run on a local model and a local file."""
    tiny_bert().save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    small_dataset(rows=90).to_csv(tmp_path / "rows.csv", index=False)
    return options(model=tmp_path / "model", dataset=tmp_path / "rows.csv", **SMALL)


def options(**values: object) -> list[str]:
    pairs = [(f"--{name.replace('_', '-')}", str(value)) for name, value in values.items()]
    return [word for pair in pairs for word in pair]


def check_refused(outcome: Outcome, *said: str, at: Path) -> None:
    """Status 2, one short error that says all of this, and no run folder."""
    assert outcome.status == 2
    message = outcome.error.strip()
    for words in said:
        assert words in message
    assert "Traceback" not in message
    assert len(message) < 700
    assert not at.exists()


def test_train_evaluate_resume(call: Callable[..., Outcome], folders: list[str]) -> None:
    trained = call("train", *folders, "--output-dir", "run")
    assert trained.status == 0
    assert "round 2/2" in trained.out
    for heading in (
        "client",
        "acc.",
        "F1",
        "majority",
        "others",
        "mean",
        "best round",
        "bytes a round",
    ):
        assert heading in trained.out
    table = [line for line in trained.out.splitlines() if line.startswith(("│", "┃"))]
    assert len(table) == 1 + 3 + 1
    again = call("evaluate", "run")
    assert again.status == 0
    assert [line for line in again.out.splitlines() if line.startswith(("│", "┃"))] == table
    assert call("resume", "run").status == 0


def test_options_in_a_file_and_on_the_line(
    call: Callable[..., Outcome], folders: list[str], tmp_path: Path
) -> None:
    (tmp_path / "c.toml").write_text('method = "fedavg"\nrank = 5\nmax_grad_norm = "none"\n')
    assert call("train", "c.toml", *folders, "--rank", "3", "--output-dir", "run").status == 0
    resolved = (tmp_path / "run" / "config.toml").read_text()
    assert 'method = "fedavg"' in resolved
    assert "rank = 3" in resolved  # the line wins over the file
    assert 'max_grad_norm = "none"' in resolved


def test_the_default_place_of_a_run(call: Callable[..., Outcome], folders: list[str]) -> None:
    assert call("train", *folders).status == 0
    [folder] = os.listdir("runs")
    assert folder.endswith("-fedsa-lora")


def test_unknown_option(call: Callable[..., Outcome], tmp_path: Path) -> None:
    outcome = call("train", "--learning-rat", "1", "--output-dir", "run")
    check_refused(outcome, "--learning-rat", "--learning-rate", at=tmp_path / "run")


def test_unknown_option_in_a_file(call: Callable[..., Outcome], tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text("learning_rat = 1\n")
    outcome = call("train", "c.toml", "--output-dir", "run")
    check_refused(outcome, "learning_rat:", "did you mean 'learning_rate'?", at=tmp_path / "run")


def test_a_file_that_is_not_toml(call: Callable[..., Outcome], tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text("rank: 4\n")
    check_refused(call("train", "c.toml"), "c.toml is not valid TOML", at=tmp_path / "runs")
    check_refused(call("train", "d.toml"), "cannot read d.toml", at=tmp_path / "runs")


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("rank", "0", "greater than or equal to 1, but '0' was given"),
        ("rank", "many", "valid integer"),
        ("dropout", "1.0", "less than 1"),
        ("method", "fedsaa", "did you mean 'fedsa'?"),
        ("adapter", "dora", "'lora'"),
        ("clients_per_pass", "0", "clients_per_pass"),
        ("device", "warp", "cannot use 'warp'"),
        ("momentum", "0.9", "optimizer='sgd'"),
        ("text_column", "a,b,c", "two for a sentence pair"),
    ],
)
def test_impossible_value(
    call: Callable[..., Outcome], tmp_path: Path, name: str, value: str, said: str
) -> None:
    outcome = call("train", *options(**{name: value}), "--output-dir", "run")
    check_refused(outcome, said, at=tmp_path / "run")


def with_option(folders: Sequence[str], **values: object) -> list[str]:
    changed = dict(zip(folders[::2], folders[1::2], strict=True))
    changed |= dict(zip(options(**values)[::2], options(**values)[1::2], strict=True))
    return [word for pair in changed.items() for word in pair]


def test_head_that_cannot_be_shared(
    call: Callable[..., Outcome], folders: list[str], tmp_path: Path
) -> None:
    arguments = with_option(folders, method="local", head="shared", output_dir="run")
    check_refused(call("train", *arguments), "head", "shares nothing", at=tmp_path / "run")


def test_unknown_target_module(
    call: Callable[..., Outcome], folders: list[str], tmp_path: Path
) -> None:
    arguments = with_option(folders, target_modules="qeury", output_dir="run")
    outcome = call("train", *arguments)
    check_refused(outcome, "no layer 'qeury'", "did you mean 'query'?", at=tmp_path / "run")


def test_missing_label_column(
    call: Callable[..., Outcome], folders: list[str], tmp_path: Path
) -> None:
    arguments = with_option(folders, label_column="lable", output_dir="run")
    outcome = call("train", *arguments)
    check_refused(outcome, "no column 'lable'", "did you mean 'label'?", at=tmp_path / "run")


def test_label_seen_only_in_test(
    call: Callable[..., Outcome], folders: list[str], tmp_path: Path
) -> None:
    train = Dataset.from_dict({"text": ["w1", "w2"] * 20, "label": ["good", "bad"] * 20})
    test = Dataset.from_dict({"text": ["w1", "w2", "w3"], "label": ["good", "bad", "ugly"]})
    DatasetDict(train=train, test=test).save_to_disk(tmp_path / "data")
    arguments = with_option(
        folders, dataset=tmp_path / "data", common_rows=10, output_dir="run", partition="iid"
    )
    outcome = call("train", *arguments)
    check_refused(outcome, "label 'ugly' occurs only in", "common_rows=0", at=tmp_path / "run")


def test_empty_shard(call: Callable[..., Outcome], folders: list[str], tmp_path: Path) -> None:
    rows = {"text": ["w1"] * 7, "label": [0, 1] * 3 + [0], "site": ["a"] * 6 + ["b"]}
    Dataset.from_dict(rows).to_csv(tmp_path / "sites.csv", index=False)
    arguments = with_option(
        folders, dataset=tmp_path / "sites.csv", clients=2, partition="column:site"
    )
    outcome = call("train", *arguments, "--output-dir", "run")
    check_refused(outcome, "client 1 would have 1 rows", "take fewer clients", at=tmp_path / "run")


def test_more_clients_than_the_partitioner_can_serve(
    call: Callable[..., Outcome], folders: list[str], tmp_path: Path
) -> None:
    for spec in ("dirichlet:0.05", "iid"):
        arguments = with_option(folders, clients=80, partition=spec, output_dir="run")
        outcome = call("train", *arguments)
        check_refused(outcome, "90 rows over 80 clients", "fewer clients", at=tmp_path / "run")


def test_clients_that_the_column_does_not_have(
    call: Callable[..., Outcome], folders: list[str], tmp_path: Path
) -> None:
    arguments = with_option(folders, clients=5, partition="column:label", output_dir="run")
    check_refused(
        call("train", *arguments), "has 3 clients, but 5", "set clients=3", at=tmp_path / "run"
    )


def test_missing_data_and_model(
    call: Callable[..., Outcome], folders: list[str], tmp_path: Path
) -> None:
    arguments = with_option(folders, dataset="./rows.jsonl", output_dir="run")
    check_refused(
        call("train", *arguments), "dataset: cannot read './rows.jsonl'", at=tmp_path / "run"
    )
    arguments = with_option(folders, model="no/such-model", output_dir="run")
    check_refused(
        call("train", *arguments), "model: cannot load 'no/such-model'", at=tmp_path / "run"
    )


def test_broken_checkpoint(
    call: Callable[..., Outcome], folders: list[str], tmp_path: Path
) -> None:
    assert call("train", *folders, "--output-dir", "run").status == 0
    (tmp_path / "run" / "result.json").unlink()  # as if it had been interrupted
    [client] = (tmp_path / "run" / "checkpoint").glob("client-00001*")
    whole = client.read_bytes()
    client.write_bytes(whole[: len(whole) // 2])
    before = sorted(p.name for p in (tmp_path / "run").rglob("*"))
    outcome = call("resume", "run")
    assert outcome.status == 2
    assert client.name in outcome.error
    assert "restore it from a backup" in outcome.error
    assert sorted(p.name for p in (tmp_path / "run").rglob("*")) == before
    client.write_bytes(whole)
    assert call("resume", "run").status == 0


def test_no_run_folder(call: Callable[..., Outcome], tmp_path: Path) -> None:
    for command in ("resume", "evaluate"):
        outcome = call(command, "nowhere")
        check_refused(outcome, "nowhere is not a run folder", at=tmp_path / "nowhere")


def test_read_only_output_folder(
    call: Callable[..., Outcome], folders: list[str], tmp_path: Path, monkeypatch: Any
) -> None:
    """Root may write anywhere, so the system's refusal is played."""
    (tmp_path / "sealed").mkdir()
    original = Path.mkdir

    def mkdir(path: Path, *arguments: Any, **options: Any) -> None:
        if path.parent.name == "sealed":
            raise PermissionError(13, "Permission denied", str(path))
        original(path, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", mkdir)
    outcome = call("train", *folders, "--output-dir", "sealed/run")
    check_refused(
        outcome, "output_dir: cannot write to sealed/run: Permission denied", at=Path("sealed/run")
    )
    assert os.listdir(tmp_path / "sealed") == []


def test_output_folder_below_a_file(
    call: Callable[..., Outcome], folders: list[str], tmp_path: Path
) -> None:
    outcome = call("train", *folders, "--output-dir", "rows.csv/run")
    assert outcome.status == 2
    assert "output_dir: cannot write to rows.csv/run: Not a directory" in outcome.error


@pytest.mark.skipif(
    shutil.which("fedsa-secure") is None, reason="the console script is not on PATH"
)
def test_the_installed_command_starts() -> None:
    done = subprocess.run(["fedsa-secure", "train", "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert "--learning-rate" in done.stdout


def test_help_names_every_option() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fedsa_secure", "train", "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0
    for name in TrainConfig.model_fields:
        assert f"--{name.replace('_', '-')}" in done.stdout
    shown = " ".join(done.stdout.split())
    assert "[default: a third]" in shown
    assert "] [default:" not in shown  # one default each


# --- secure aggregation -----------------------------------------------------------------------


def test_failures_on_the_command_line(
    call: Callable[..., Outcome], folders: list[str], tmp_path: Path
) -> None:
    fails = ("--dropouts", "1:0:masked_input", "--max-attempts", "1")
    outcome = call("train", *folders, *fails, "--output-dir", "run")
    assert outcome.status == 0
    assert "round 1/2  lost" in outcome.out
    assert "attempts aborted: 1, rounds lost: [1]; TooFewClients" in outcome.out
    assert "masked: the server sees sums only" in outcome.out
    assert 'dropouts = [\n    "1:0:masked_input",\n]' in (tmp_path / "run/config.toml").read_text()
    assert call("resume", "run").status == 0
    clear = ("--secure-aggregation", "false", "--output-dir", "clear")
    assert "bytes a round, in the clear" in call("train", *folders, *clear).out
    alone = call("train", *folders, "--method", "local", "--output-dir", "alone").out
    assert "each client sends 0 bytes a round\n" in alone


def test_two_clients_are_refused(
    call: Callable[..., Outcome], folders: list[str], tmp_path: Path
) -> None:
    outcome = call("train", *folders, "--clients", "2", "--output-dir", "run")
    words = ("secure_aggregation:", "at least 3 clients", "secure_aggregation=False")
    check_refused(outcome, *words, at=tmp_path / "run")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"weighting": "samples"}, "weight_cap"),
        ({"weight_cap": 5}, "weighting='samples'"),
        ({"dropouts": 1.5}, "dropouts"),
        ({"dropouts": 0.1, "secure_aggregation": "false"}, "secure_aggregation"),
        ({"threat": "none of your business"}, "'malicious' or 'honest-but-curious'"),
        ({"min_survivors": 2}, "min_survivors"),
    ],
)
def test_options_that_do_not_go_together(
    call: Callable[..., Outcome], tmp_path: Path, given: dict[str, Any], said: str
) -> None:
    outcome = call("train", *options(**given), "--output-dir", "run")
    check_refused(outcome, said, at=tmp_path / "run")


def test_identities_and_the_roster(call: Callable[..., Outcome], tmp_path: Path) -> None:
    keys = []
    for client in range(3):
        made = call("keys", "new", f"{client}.pem")
        assert made.status == 0
        assert (tmp_path / f"{client}.pem").stat().st_mode & 0o777 == 0o600
        shown = call("keys", "show", f"{client}.pem")
        assert shown.out == made.out
        keys.append(made.out.strip())
        listed = call("keys", "register", "roster.json", str(client), keys[-1])
        assert listed.out.splitlines() == [f"{n}  {key}" for n, key in enumerate(keys)]
    assert len(set(keys)) == 3
    roster = load_roster(tmp_path / "roster.json")
    assert roster == {n: bytes.fromhex(key) for n, key in enumerate(keys)}


def test_identities_are_refused_by_name(call: Callable[..., Outcome], tmp_path: Path) -> None:
    key = call("keys", "new", "a.pem").out.strip()
    private = (tmp_path / "a.pem").read_bytes()
    nothing = tmp_path / "nothing"
    check_refused(call("keys", "new", "a.pem"), "a.pem exists", at=nothing)
    assert (tmp_path / "a.pem").read_bytes() == private
    check_refused(call("keys", "new", "no/where.pem"), "cannot write no/where.pem", at=nothing)
    check_refused(call("keys", "show", "b.pem"), "cannot read b.pem", "keys new", at=nothing)
    (tmp_path / "a.pem").chmod(0o640)
    check_refused(call("keys", "show", "a.pem"), "mode 0640", "chmod 600", at=nothing)
    (tmp_path / "c.pem").write_text("no key")
    (tmp_path / "c.pem").chmod(0o600)
    check_refused(call("keys", "show", "c.pem"), "holds no Ed25519 private key", at=nothing)
    bad = call("keys", "register", "roster.json", "0", "abc")
    check_refused(bad, "client 0 of roster.json", "64 hexadecimal digits", at=nothing)
    assert call("keys", "register", "roster.json", "0", key).status == 0
    again = call("keys", "register", "roster.json", "0", "00" * 32)
    check_refused(again, "client 0 is on roster.json already", key, at=nothing)
    twice = call("keys", "register", "roster.json", "1", key)
    check_refused(twice, "a public key occurs twice", at=nothing)
    assert load_roster(tmp_path / "roster.json") == {0: bytes.fromhex(key)}
    (tmp_path / "roster.json").write_text("[]")
    other = call("keys", "register", "roster.json", "1", "00" * 32)
    check_refused(other, "roster.json is no roster", at=nothing)
