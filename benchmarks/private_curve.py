"""From how many records, clients and ε on a private A is worth more than a random one.

A task whose optimum is known: client k sees y = B_k·A·x + noise, with an A that all share and a B_k
of its own. The private A is trained by the private step of the library (its twin: A and B̃ clipped
and noised, A averaged every round); then every client fits its own B to the released A by least
squares. Beside it: the same with a random A, and a client's own least squares without any A. What
is measured is the test error above that of the true A and B_k, as a share of what predicting zero
leaves. One CSV row per run; rows that are there are not run again. At the end it writes a table
into ``docs/privacy.md``.

    python benchmarks/private_curve.py
"""

import itertools
import statistics
from pathlib import Path

import torch
from record import RESULTS, append_row, environment, read_rows, write_block
from torch import Tensor, nn

from fedsa_secure.adapters import AdapterSettings, BatchContext, LoRALinear
from fedsa_secure.federation.optimizers import OptimizerSettings, OptimizerState, StackedOptimizer
from fedsa_secure.privacy import (
    ClipGroup,
    PartialBatch,
    PrivateStep,
    SecretPoissonSampler,
    TurnSecret,
    noise_multiplier_for,
)

CSV = RESULTS / "private_curve.csv"
TABLES = Path(__file__).parents[1] / "docs" / "privacy.md"
D_IN, D_OUT, RANK, NOISE = 32, 4, 2, 1.5
RECORDS = (25, 50, 100, 200, 400, 800, 1600)
CLIENTS, EPSILONS, SEEDS = (10, 40), (1.0, 3.0, 8.0), (0, 1, 2)
ROUNDS, STEPS, RATE, DELTA, LEARNING_RATE = 20, 2, 0.25, 1e-5, 3e-2


def main() -> None:
    """Run what is missing, then write the table."""
    keys = ("clients", "records", "epsilon", "seed")
    done = {tuple(row[key] for key in keys) for row in read_rows(CSV)}
    for clients, records, epsilon, seed in itertools.product(CLIENTS, RECORDS, EPSILONS, SEEDS):
        key = (str(clients), str(records), f"{epsilon:g}", str(seed))
        if key not in done:
            errors = run(clients, records, epsilon, seed)
            row = dict(zip(keys, key, strict=True)) | {n: f"{e:.4f}" for n, e in errors.items()}
            append_row(CSV, {**row, **environment()})
    write_block(TABLES, "curve", table(read_rows(CSV)))


def run(clients: int, records: int, epsilon: float, seed: int) -> dict[str, float]:
    """Excess test errors of the three ways, mean over the clients."""
    torch.manual_seed(seed)
    true_a = torch.linalg.qr(torch.randn(D_IN, RANK))[0].t()
    true_b = torch.randn(clients, D_OUT, RANK)

    def draw(count: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(clients, count, D_IN)
        clean = x @ true_a.t() @ true_b.transpose(1, 2)
        return x, clean + NOISE * torch.randn_like(clean)

    train, test = draw(records), draw(500)
    start = torch.randn(RANK, D_IN) / D_IN**0.5
    private = private_a(train, start, epsilon)
    whole = test[1].square().mean() - NOISE**2
    return {
        "private": float((error(private, train, test) - NOISE**2) / whole),
        "random": float((error(start, train, test) - NOISE**2) / whole),
        "alone": float((error(torch.eye(D_IN), train, test) - NOISE**2) / whole),
    }


def error(A: Tensor, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> Tensor:
    """Mean squared test error of every client's own ridge regression on A·x."""
    inner = train[0] @ A.t()
    gram = inner.transpose(1, 2) @ inner + 1e-3 * torch.eye(len(A))
    fitted = torch.linalg.solve(gram, inner.transpose(1, 2) @ train[1])
    return (test[0] @ A.t() @ fitted - test[1]).square().mean()


def private_a(train: tuple[Tensor, Tensor], start: Tensor, epsilon: float) -> Tensor:
    """A after all rounds: the mean of the clients' private twins."""
    clients, records, _ = train[0].shape
    context = BatchContext(clients=clients)
    settings = AdapterSettings(kind="lora", rank=RANK, alpha=float(RANK), dropout=0.0)
    base = nn.Linear(D_IN, D_OUT, bias=False)
    nn.init.zeros_(base.weight)
    layer = LoRALinear(base, settings, "layer", context)
    layer.A = nn.Parameter(start.expand(clients, -1, -1).clone())
    layer.B = nn.Parameter(torch.zeros(clients, D_OUT, RANK))
    parameters = {"A": layer.A, "B": layer.B}
    moments = {f"{n}#{m}": torch.zeros_like(p) for n, p in parameters.items() for m in "mv"}
    state = OptimizerState(moments, torch.zeros(clients, dtype=torch.float64))
    optimizer = StackedOptimizer(parameters, state, OptimizerSettings())
    sigma = noise_multiplier_for(epsilon, DELTA, RATE, ROUNDS * STEPS)
    for number in range(ROUNDS):
        secrets = [TurnSecret.fresh() for _ in range(clients)]
        step = PrivateStep(
            layer,
            [ClipGroup((p,), 0.1 * 2**-0.5) for p in parameters.values()],
            optimizer,
            noise_multiplier=sigma,
            expected_batches=torch.full((clients,), RATE * records),
            secrets=secrets,
        )
        samplers = [SecretPoissonSampler(s, records, RATE, STEPS) for s in secrets]
        optimizer.rates = dict.fromkeys(parameters, LEARNING_RATE * (1 - number / ROUNDS))
        with step.open():
            for drawn in zip(*samplers, strict=True):
                step([losses(layer, context, train, drawn)])
        with torch.no_grad():
            layer.A.copy_(layer.A.mean(0, keepdim=True).expand_as(layer.A))
    return layer.A[0].detach()


def losses(
    layer: LoRALinear, context: BatchContext, train: tuple[Tensor, Tensor], drawn: tuple[list, ...]
) -> PartialBatch:
    """Squared errors of the records of a step, filled up with a client's first one."""
    size = max(1, *(len(places) for places in drawn))
    places = torch.zeros(len(drawn), size, dtype=torch.int64)
    real = torch.zeros(len(drawn), size, dtype=torch.bool)
    for c, own in enumerate(drawn):
        places[c, : len(own)], real[c, : len(own)] = torch.tensor(own, dtype=torch.int64), True
    x, y = (part.gather(1, places[..., None].expand(-1, -1, part.shape[-1])) for part in train)
    context.rows = places.numel()
    return PartialBatch((layer(x.flatten(0, 1)) - y.flatten(0, 1)).square().sum(1) / 2, real)


def table(rows: list[dict[str, str]]) -> str:
    """Excess errors in per cent, one line per number of clients and records."""
    lines = [
        "| clients | records each | "
        + " | ".join(f"private A, ε={epsilon:g}" for epsilon in EPSILONS)
        + " | random A | own least squares, no A |",
        "|" + "---|" * (4 + len(EPSILONS)),
    ]
    for clients, records in itertools.product(CLIENTS, RECORDS):
        own = [r for r in rows if (r["clients"], r["records"]) == (str(clients), str(records))]
        if not own:
            continue
        cells = [_mean([r for r in own if r["epsilon"] == f"{e:g}"], "private") for e in EPSILONS]
        cells += [_mean(own, "random"), _mean(own, "alone")]
        lines.append(f"| {clients} | {records} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _mean(rows: list[dict[str, str]], name: str) -> str:
    return f"{100 * statistics.mean(float(row[name]) for row in rows):.0f}" if rows else "–"


if __name__ == "__main__":
    main()
