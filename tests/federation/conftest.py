"""A tiny federation: random BERT, made-up words, unequal clients. And runs that are killed."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, concatenate_datasets

from fedsa_secure import TrainConfig
from fedsa_secure.adapters import AdaptedModel, AdapterSettings, attach
from fedsa_secure.data import FederatedData, divide, encode_division
from fedsa_secure.federation.run_folder import RunFolder
from fedsa_secure.methods import find_method
from fedsa_secure.runtimes.simulation import Simulation


@dataclass
class Federation:
    """Everything a run needs, built without the public interface.

    Args:
        config: three or more clients by column, four steps a round.
        model: adapted, in the dtype that was asked for.
        data: everybody's rows.
        folder: below it runs are made.
    """

    config: TrainConfig
    model: AdaptedModel
    data: FederatedData
    folder: Path

    def simulate(self, name: str, **options: Any) -> Simulation:
        """Run with some options changed, in a folder of its own."""
        config = self.config.replace(output_dir=str(self.folder / name), **options)
        simulation = Simulation(config, self.model, self.data, RunFolder.create(config))
        with closing(simulation):
            simulation.run()
        return simulation


def clients_dataset(sizes: Sequence[int], make: Callable[..., Dataset], seed: int = 0) -> Dataset:
    """Rows of several clients with a column that says whose they are."""
    parts = [
        make(size, classes=3, seed=seed * 100 + k).add_column("client", [k] * size)
        for k, size in enumerate(sizes)
    ]
    return concatenate_datasets(parts)


# Wider, higher and square: 32 → 48, 48 → 32 and 32 → 32.
TARGETS = ("query", "intermediate.dense", "layer.1.output.dense")


@pytest.fixture(scope="session")
def federation(
    tiny_bert: Any,
    tiny_tokenizer: Any,
    small_dataset: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., Federation]:
    """`federation(sizes=(40, 9, 25, 60), dtype=float32, rows=None, **options)`."""

    def make(
        sizes: Sequence[int] = (40, 9, 25, 60),
        dtype: torch.dtype = torch.float32,
        rows: Dataset | None = None,
        **options: Any,
    ) -> Federation:
        defaults = {
            "partition": "column:client",
            "clients": len(sizes),
            "rank": 3,
            "target_modules": TARGETS,
            "dropout": 0.2,
            "batch_size": 8,  # the second client has fewer rows to train on
            "rounds": 3,
            "local_steps": 4,
            "learning_rate": 5e-3,
            "max_length": 16,
            "common_rows": 0,
            "clients_per_pass": len(sizes),
            "evaluate_every": 100,
        }
        if options.get("adapter") == "vera":  # d and b want other rates than a head
            defaults |= {"learning_rate": 5e-2, "head_learning_rate": 5e-3}
        config = TrainConfig.build(**{**defaults, **options})
        rows = rows if rows is not None else clients_dataset(sizes, small_dataset)
        division = divide(rows, config.partition, config, split_key=bytes(32))
        data = encode_division(division, tiny_tokenizer, config)
        settings = AdapterSettings(
            kind=config.adapter,
            rank=config.rank,
            alpha=config.alpha,
            dropout=config.dropout,
            target_modules=config.target_modules,
            private=find_method(config.method).has_private_adapter,
            frozen_b=config.dp_epsilon is not None and config.dp_release == "frozen-b",
        )
        model = attach(tiny_bert().to(dtype), settings, config.seed)
        return Federation(config, model, data, tmp_path_factory.mktemp("federation"))

    return make


class Zygote:
    """A process that runs `train` and `resume` in children, and kills them when asked."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).parent / "zygote.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert self._process.stdout.readline() == "ready\n"

    def call(self, action: str, delay: float | None = None, **options: Any) -> tuple[int, float]:
        self._process.stdin.write(json.dumps([action, options, delay]) + "\n")
        self._process.stdin.flush()
        status, seconds = json.loads(self._process.stdout.readline())
        return status, seconds

    def close(self) -> None:
        with self._process:  # closes the pipes and waits
            self._process.stdin.close()


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    made = Zygote()
    yield made
    made.close()
