"""The simulator against the loop that a user would write today with PEFT.

One PeftModel; for every client and round its state goes in by ``set_peft_model_state_dict``, a
torch optimizer takes the local steps, and its state comes out again; then the As are averaged.
Both train the same clients on the same rows with the same padding, start, optimizer, clipping and
schedule, and both keep the base model's own dropout off. After every round of the simulator the
loop does the same round, so that both meet the same noise of the machine.

Without adapter dropout both must end with the same A, which the last column proves. With it each
draws its own bits, at the same rate.

    python benchmarks/simulator_vs_peft.py [--rounds N] [--clients N]
"""

import argparse
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from record import RESULTS, append_row, environment, write_block

from fedsa_secure import TrainConfig
from fedsa_secure.adapters import AdapterSettings, attach, load_pretrained, peft_config, peft_state
from fedsa_secure.data import FederatedData, collate, divide, draw_rows, encode_division
from fedsa_secure.federation.history import RoundRecord, RoundTiming
from fedsa_secure.federation.run_folder import RunFolder
from fedsa_secure.federation.schedule import rate_factor
from fedsa_secure.federation.stacking import clients_per_pass
from fedsa_secure.runtimes.simulation import Simulation
from fedsa_secure.types import Role

_SPECIAL_TOKENS = 2


def texts_of_length(tokens: int, rows: int, seed: int) -> Dataset:
    """Rows of exactly so many tokens, from common words that are one token each."""
    words = ["the", "of", "and", "in", "to", "was", "he", "is", "as", "for", "on", "with", "that"]
    stream = np.random.default_rng(seed)
    chosen = stream.choice(words, size=(rows, tokens - _SPECIAL_TOKENS))
    return Dataset.from_dict(
        {"text": [" ".join(row) for row in chosen], "label": stream.integers(0, 2, rows).tolist()}
    )


class PeftLoop:
    """Federated averaging of A with one PeftModel; an observer that runs round after round.

    Args:
        config: the configuration of the simulator that it follows.
        data: the same rows.
    """

    def __init__(self, config: TrainConfig, data: FederatedData) -> None:
        self._config, self._data = config, data
        adapted = attach(load_pretrained(config.model, 2, config.seed)[0], _settings(config), 0)
        start = peft_state(adapted, {})
        base, _ = load_pretrained(config.model, 2, config.seed)
        self._model = get_peft_model(base, peft_config(adapted, config.model)).eval()
        for name, module in self._model.named_modules():
            if "lora_dropout" in name:
                module.train()
        for name, parameter in self._model.named_parameters():
            parameter.requires_grad_("lora_" in name or "modules_to_save" in name)
        self._trained = [p for p in self._model.parameters() if p.requires_grad]
        self._clients = [dict(start) for _ in data.shards]
        self._optimizers: list[dict | None] = [None for _ in data.shards]
        self.shared = {name: t for name, t in start.items() if ".lora_A." in name}
        self.ours: list[float] = []
        self.theirs: list[float] = []

    def started(self, config: TrainConfig, folder: Path, rounds_done: int) -> None:
        pass

    def finished(self) -> None:
        pass

    def round_finished(self, record: RoundRecord, timing: RoundTiming) -> None:
        self.ours.append(timing.train + timing.aggregate)
        start = time.perf_counter()
        self._round(record.round)
        self.theirs.append(time.perf_counter() - start)

    def _round(self, number: int) -> None:
        received = []
        for client in range(len(self._clients)):
            self._turn(client, number)
            received.append({name: self._clients[client][name] for name in self.shared})
        self.shared = {
            name: torch.stack([update[name] for update in received]).mean(0) for name in self.shared
        }

    def _turn(self, client: int, number: int) -> None:
        config = self._config
        set_peft_model_state_dict(self._model, {**self._clients[client], **self.shared})
        optimizer = torch.optim.AdamW(self._trained, weight_decay=config.weight_decay)
        if self._optimizers[client] is not None:
            optimizer.load_state_dict(self._optimizers[client])
        rows = draw_rows(
            self._data.shards[client].train,
            config.local_steps,
            config.batch_size,
            config.seed,
            client,
            number,
        )
        for step, chosen in enumerate(rows):
            batch = collate(self._data.rows, [chosen], torch.device("cpu"))
            done = (number - 1) * config.local_steps + step
            total = config.rounds * config.local_steps
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * rate_factor(config.schedule, done, total)
            loss = self._model(**batch.inputs, labels=batch.labels).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self._trained, config.max_grad_norm)
            optimizer.step()
        state = get_peft_model_state_dict(self._model)
        self._clients[client] = {name: tensor.clone() for name, tensor in state.items()}
        self._optimizers[client] = optimizer.state_dict()


def _settings(config: TrainConfig) -> AdapterSettings:
    return AdapterSettings(rank=config.rank, alpha=config.alpha, dropout=config.dropout)


def measure(
    batch: int, length: int, dropout: float, clients: int, rounds: int
) -> dict[str, object]:
    """Both loops on one shape; the first round warms up and does not count."""
    steps = 4
    config = TrainConfig.build(
        batch_size=batch,
        dropout=dropout,
        clients=clients,
        rounds=rounds + 1,
        local_steps=steps,
        partition="iid",
        max_length=length,
        common_rows=0,
        test_fraction=0.1,
        evaluate_every=rounds + 1,
        secure_aggregation=False,  # the loop has no protocol either
    )
    rows = texts_of_length(length, clients * batch * steps * 10 // 8, seed=batch * length)
    model, tokenizer = load_pretrained(config.model, 2, config.seed)
    data = encode_division(divide(rows, config.partition, config), tokenizer, config)
    per_pass = clients_per_pass(config, data, torch.device("cpu"))
    loop = PeftLoop(config, data)
    with tempfile.TemporaryDirectory() as folder:
        config = config.replace(clients_per_pass=per_pass, output_dir=f"{folder}/run")
        adapted = attach(model, _settings(config), 0)
        simulation = Simulation(config, adapted, data, RunFolder.create(config), [loop])
        simulation.run()
    ours, theirs = loop.ours[1:], loop.theirs[1:]
    names = adapted.names([Role.A])
    difference = max(
        (a - b).abs().max().item()
        for a, b in zip((simulation.shared[n] for n in names), loop.shared.values(), strict=True)
    )
    return {
        "batch": batch,
        "length": length,
        "dropout": dropout,
        "clients": clients,
        "clients_per_pass": per_pass,
        "rounds": rounds,
        "simulator_s_p50": f"{statistics.median(ours):.3f}",
        "peft_s_p50": f"{statistics.median(theirs):.3f}",
        "peft_over_simulator": f"{statistics.median(theirs) / statistics.median(ours):.3f}",
        "max_difference_of_A": f"{difference:.1e}",
    }


def main() -> None:
    """Measure the table, print it, and append it to the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clients", type=int, default=8)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", module="peft|transformers")  # on names and deprecations
    shapes = [(batch, length, p) for p in (0.0, 0.05) for batch in (8, 32) for length in (16, 64)]
    rows = []
    for batch, length, dropout in shapes:
        row = measure(batch, length, dropout, arguments.clients, arguments.rounds)
        append_row(RESULTS / "simulator_vs_peft.csv", {**row, **environment()})
        rows.append(row)
        print({name: str(value) for name, value in row.items()}, flush=True)
    lines = ["| " + " | ".join(name.replace("_", " ") for name in rows[0]) + " |"]
    lines.append("|---" * len(rows[0]) + "|")
    lines += ["| " + " | ".join(str(value) for value in row.values()) + " |" for row in rows]
    write_block(Path(__file__).parent / "README.md", "simulator_vs_peft", "\n".join(lines))


if __name__ == "__main__":
    main()
