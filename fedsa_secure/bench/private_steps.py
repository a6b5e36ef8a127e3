"""One training step, plain and private, ours and Opacus', each set up so that it can be timed.

As a module it prints the memory that one of them takes, in a process that does nothing else.
"""

import json
import sys
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from opacus import GradSampleModule
from opacus.grad_sample import GradSampleModuleFastGradientClipping
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping
from peft import get_peft_model
from torch import Tensor, nn
from torch.nn import functional
from transformers import BertConfig, BertForSequenceClassification

from fedsa_secure.adapters import (
    AdaptedModel,
    AdapterSettings,
    attach,
    load_pretrained,
    peft_config,
)
from fedsa_secure.bench.timing import forget_peak_memory, peak_memory
from fedsa_secure.errors import MissingExtraError
from fedsa_secure.privacy import ClipGroup, PartialBatch, PrivateStep, TurnSecret
from fedsa_secure.types import Role

RANK, CLASSES = 8, 2
_THRESHOLD, _SIGMA, _RATE = 0.1, 1.0, 1e-6
_VOCABULARY = 30_000
_TRAINED = (Role.A, Role.B, Role.HEAD)
_MINILM = {  # sizes of all-MiniLM-L6-v2
    "hidden_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "intermediate_size": 1536,
}

Step = Callable[[], object]


@dataclass(frozen=True)
class Size:
    """What a step works on.

    Args:
        tokens: of every record.
        rows: records.
    """

    tokens: int
    rows: int

    def __str__(self) -> str:
        return f"T={self.tokens}, B={self.rows}"


class Batch:
    """Random records of one length, with labels."""

    def __init__(self, size: Size) -> None:
        stream = torch.Generator().manual_seed(0)
        ids = torch.randint(4, _VOCABULARY, (size.rows, size.tokens), generator=stream)
        self.inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        self.labels = torch.randint(0, CLASSES, (size.rows,), generator=stream)
        self.real = torch.ones(1, size.rows, dtype=torch.bool)


def base_model() -> tuple[Any, str]:
    """MiniLM, or without the extra ``demo`` a random BERT of its size; and its name."""
    try:
        return load_pretrained("minilm", CLASSES, 0)[0], "MiniLM"
    except MissingExtraError:
        config = BertConfig(vocab_size=_VOCABULARY, num_labels=CLASSES, **_MINILM)
        return BertForSequenceClassification(config), "a random BERT of MiniLM's size"


def our_plain(size: Size, stack: ExitStack) -> Step:
    """Forward, backward and SGD step of our model, without privacy."""
    batch, model = Batch(size), _ours()
    optimizer = torch.optim.SGD(model.parameters(_TRAINED).values(), lr=_RATE)

    def step() -> None:
        optimizer.zero_grad()
        functional.cross_entropy(model(batch.inputs), batch.labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def our_private(size: Size, stack: ExitStack) -> Step:
    """The same with clipping and noise, as training does it."""
    batch, model = Batch(size), _ours()
    parameters = tuple(model.parameters(_TRAINED).values())
    private = PrivateStep(
        model.model,
        [ClipGroup(parameters, _THRESHOLD)],
        torch.optim.SGD(parameters, lr=_RATE),
        noise_multiplier=_SIGMA,
        expected_batches=torch.full((1,), float(size.rows)),
        secrets=[TurnSecret.fresh()],
    )
    stack.enter_context(private.open())

    def step() -> None:
        losses = functional.cross_entropy(model(batch.inputs), batch.labels, reduction="none")
        private([PartialBatch(losses, batch.real)])

    return step


def peft_plain(size: Size, stack: ExitStack) -> Step:
    """The same adapters by PEFT, without privacy."""
    model = _peft()
    optimizer = torch.optim.SGD(_trained(model), lr=_RATE)
    return _loop(model, optimizer, nn.CrossEntropyLoss(), Batch(size))


def opacus_hooks(size: Size, stack: ExitStack) -> Step:
    """Opacus on PEFT's model: gradients of all records from its hooks."""
    model = _peft()
    watched = GradSampleModule(model, strict=False)
    optimizer = DPOptimizer(
        torch.optim.SGD(_trained(model), lr=_RATE),
        noise_multiplier=_SIGMA,
        max_grad_norm=_THRESHOLD,
        expected_batch_size=size.rows,
    )
    return _loop(watched, optimizer, nn.CrossEntropyLoss(), Batch(size))


def opacus_ghost(size: Size, stack: ExitStack) -> Step:
    """Opacus on PEFT's model: norms without gradients, and a second backward pass."""
    model = _peft()
    watched = GradSampleModuleFastGradientClipping(
        model, max_grad_norm=_THRESHOLD, use_ghost_clipping=True, strict=False
    )
    optimizer = DPOptimizerFastGradientClipping(
        torch.optim.SGD(_trained(model), lr=_RATE),
        noise_multiplier=_SIGMA,
        max_grad_norm=_THRESHOLD,
        expected_batch_size=size.rows,
    )
    criterion = DPLossFastGradientClipping(watched, optimizer, nn.CrossEntropyLoss())
    return _loop(watched, optimizer, criterion, Batch(size))


STEPS: dict[str, Callable[[Size, ExitStack], Step]] = {
    "plain step": our_plain,
    "private step": our_private,
    "PEFT: plain step": peft_plain,
    "Opacus hooks: private step": opacus_hooks,
    "Opacus ghost: private step": opacus_ghost,
}
"""By name; each is given a stack that closes what it opens."""
BASELINES = {
    "private step": "plain step",
    "Opacus hooks: private step": "PEFT: plain step",
    "Opacus ghost: private step": "PEFT: plain step",
}
"""What a private step is compared with: the plain one of the same model."""


def _settings() -> AdapterSettings:
    return AdapterSettings(rank=RANK, alpha=2.0 * RANK)


def _ours() -> AdaptedModel:
    model = attach(base_model()[0], _settings(), 0)
    model.load([_start(model)], _TRAINED)
    return model


def _start(model: AdaptedModel) -> dict[str, Tensor]:
    """Adapters that are not at their start, where B is zero and so is every gradient of A."""
    stream = torch.Generator().manual_seed(1)
    return {
        name: value + 0.01 * torch.randn(value.shape, generator=stream)
        for name, value in model.initial.items()
    }


def _peft() -> Any:
    config = peft_config(attach(base_model()[0], _settings(), 0), "")
    config.inference_mode, config.base_model_name_or_path = False, None
    model = get_peft_model(base_model()[0], config).eval()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name or "modules_to_save" in name)
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.01)
    for module in model.modules():
        if any(p.requires_grad for p in module.parameters(recurse=False)):
            module.training = True  # Opacus' hooks sleep in eval mode
    return model


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _loop(model: Any, optimizer: Any, criterion: Any, batch: Batch) -> Step:
    def step() -> None:
        optimizer.zero_grad()
        criterion(model(**batch.inputs).logits, batch.labels).backward()
        optimizer.step()

    return step


def _main() -> None:
    name, tokens, rows, threads = sys.argv[1], *(int(argument) for argument in sys.argv[2:])
    torch.set_num_threads(threads)
    with warnings.catch_warnings(), ExitStack() as stack:
        warnings.simplefilter("ignore")  # of Opacus, about hooks on the first layer
        step = STEPS[name](Size(tokens, rows), stack)
        forget_peak_memory()
        before = peak_memory()
        step()
        step()
        sys.stdout.write(json.dumps(peak_memory() - before))


if __name__ == "__main__":
    _main()
