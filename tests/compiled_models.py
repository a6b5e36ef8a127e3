"""Adapted models under torch.compile: one graph, and the numbers of the same model without it.

A script, for a process of its own, since the checks of shapes that tests add cannot be compiled:

    python compiled_models.py bert-lora-fp32 llama-vera-checkpointed

The environment says which kernels the ops run on. Every line of the output is a model and how many
graphs were made of it, for two sets of clients.
"""

import sys
from pathlib import Path

import torch

TESTS = Path(__file__).parent
sys.path.insert(0, str(TESTS / "adapters"))

from families import FAMILIES  # noqa: E402 - its folder is known now

from fedsa_kernels import row_keys  # noqa: E402
from fedsa_secure.adapters import AdaptedModel, AdapterSettings, attach  # noqa: E402
from fedsa_secure.types import Role  # noqa: E402

CLIENTS, ROWS = 2, 3
TRAINED = {Role.A, Role.B}


def results(model: AdaptedModel, inputs: dict, seed: int) -> list[torch.Tensor]:
    """Logits and the gradients of all adapters, for clients drawn from a seed."""
    stream = torch.Generator().manual_seed(seed)
    starts = [
        {n: s + 0.3 * torch.randn(s.shape, generator=stream) for n, s in model.initial.items()}
        for _ in range(CLIENTS)
    ]
    model.load(starts, TRAINED)
    logits = model(inputs, row_keys(torch.arange(CLIENTS) + seed, ROWS).flatten())
    parameters = list(model.parameters(TRAINED).values())
    return [logits, *torch.autograd.grad(logits.square().mean(), parameters)]


def check_one_graph(family: str, kind: str, variant: str) -> int:
    """Compile a model of its own; the number of graphs."""
    kinds = {"kind": kind, "rank": 3, "dropout": 0.2, "target_modules": FAMILIES[family].targets}
    inputs = FAMILIES[family].inputs(CLIENTS * ROWS)
    plain, compiled = (
        attach(FAMILIES[family].make(), AdapterSettings(**kinds), seed=0) for _ in range(2)
    )
    for model in (plain, compiled):
        model.half_precision = variant == "bf16"
        if variant == "checkpointed":
            model.checkpoint_gradients()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled.compile(fullgraph=True, backend="aot_eager")
    for seed in (1, 2):  # other clients come in without a change of the graph
        both = zip(results(plain, inputs, seed), results(compiled, inputs, seed), strict=True)
        for expected, ours in both:
            torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-5)
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(name, check_one_graph(*name.split("-")), flush=True)
