"""One private step of stacked clients, against a loop over single records in float64."""

from collections.abc import Iterator, Sequence

import pytest
import torch
from private_stacks import (
    BROKEN,
    TRAINED,
    Rows,
    Stack,
    check_equal,
    expected_sums,
    make_rows,
    noised,
    one_part,
    secrets,
)
from torch import Tensor, nn

from fedsa_secure.adapters import AdapterSettings
from fedsa_secure.errors import PrivacyError
from fedsa_secure.federation.optimizers import (
    OptimizerSettings,
    OptimizerState,
    StackedOptimizer,
    optimizer_step,
)
from fedsa_secure.privacy import ClientDPOptimizer, ClipGroup, PartialBatch, PrivateStep

SHORT, LONG, OWN = 4, 12, 3  # tokens below and above the rank; rows of a client
SIGMA = 0.7
KINDS = {
    "lora": AdapterSettings(kind="lora", rank=8),
    "rslora": AdapterSettings(kind="rslora", rank=8),
    "vera": AdapterSettings(kind="vera", rank=16),
}
TARGETS = {"gpt2": ("c_attn", "c_fc"), "llama": ("q_proj", "down_proj"), "t5": ("q", "v", "wo")}


def make_stack(
    name: str = "bert", clients: int = 4, tokens: int = LONG, kind: str = "lora", **more: object
) -> Stack:
    settings = KINDS[kind]
    if name in TARGETS:
        settings = AdapterSettings(kind=settings.kind, rank=8, target_modules=TARGETS[name])
    return Stack(name, settings, clients, make_rows(name, clients * OWN, tokens), **more)


def some_real(clients: int) -> Tensor:
    """The first client has fill rows; the last of four has an empty batch."""
    real = torch.ones(clients, OWN, dtype=torch.bool)
    real[0, 2:] = False
    real[3:] = False
    return real


def groups_of(stack: Stack, joint: bool) -> list[list[str]]:
    """Names of what is clipped together."""
    if joint:
        return [list(stack.parameters)]
    return [list(stack.model.parameters([role])) for role in stack.trained]


def means(alone: dict[str, Tensor], groups: Sequence[Sequence[str]]) -> list[float]:
    """Thresholds that some records are above and some below."""
    found = []
    for names in groups:
        squares = torch.stack([alone[name].flatten(1).square().sum(1) for name in names]).sum(0)
        norms = squares.sqrt()
        norms = norms[norms.isfinite()]
        found.append(float(norms.mean()))
        assert norms.max() > found[-1] > norms.min()
    return found


def moved(stack: Stack, before: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: before[name] - p.detach() for name, p in stack.parameters.items()}


def values(stack: Stack) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in stack.parameters.items()}


def check_one_step(
    stack: Stack, real: Tensor, joint: bool = True, alone: dict[str, Tensor] | None = None
) -> None:
    """A step of plain SGD with rate 1 moves by minus the loop's clipped, noised, divided sum."""
    alone = stack.alone() if alone is None else alone
    groups = groups_of(stack, joint)
    thresholds = means(alone, groups)
    sums = expected_sums(stack, alone, groups, real=real, thresholds=thresholds)
    deviation = SIGMA * sum(c**2 for c in thresholds) ** 0.5
    expected = [1.0 + client for client in range(stack.clients)]
    divided = {
        name: torch.stack([one / size for one, size in zip(each, expected, strict=True)])
        for name, each in noised(stack, sums, deviation).items()
    }
    step, before = stack.step(thresholds, SIGMA, expected=expected), values(stack)
    with step.open():
        step(one_part(stack, real))
    check_equal(moved(stack, before), divided)


@pytest.mark.parametrize("joint", [True, False], ids=["joint", "groups"])
@pytest.mark.parametrize(("clients", "tokens"), [(1, LONG), (4, SHORT), (4, LONG)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_equals_a_loop_over_records(kind, clients, tokens, joint):
    check_one_step(make_stack("bert", clients, tokens, kind), some_real(clients), joint)


@pytest.mark.parametrize("name", ["roberta", "albert", "gpt2", "llama", "t5"])
def test_a_step_equals_a_loop_over_records_on_other_models(name):
    check_one_step(make_stack(name, 2), some_real(2))


@pytest.mark.parametrize("tokens", [SHORT, LONG])
@pytest.mark.parametrize("clients", [1, 4], ids=["C1", "C4"])
@pytest.mark.parametrize("filling", [False, True], ids=["record", "fill row"])
def test_a_row_that_is_not_finite_counts_nothing(filling, clients, tokens):
    stack = make_stack("bert", clients, tokens, broken=True)
    row = 2 if filling else 1
    stack.rows.ids[row, 1] = BROKEN
    alone = stack.alone()
    assert not all(g[row].isfinite().all() for g in alone.values())
    check_one_step(stack, some_real(clients), alone=alone)


def test_a_gradient_too_large_for_its_norm_counts_nothing():
    """In float32 a finite gradient of 1e25 has the squared norm infinity."""
    parameter = nn.Parameter(torch.zeros(1, 2))
    step = ClientDPOptimizer(
        torch.optim.SGD([parameter], lr=1.0),
        [ClipGroup((parameter,), 1.0)],
        noise_multiplier=0.0,
        expected_batches=torch.ones(1),
        noise=lambda count: torch.zeros(1, count),
    )
    parameter.grad_sample = torch.tensor([[1e25, 0.0], [0.0, 0.5]])
    step.count_only(torch.ones(1, 2, dtype=torch.bool))
    step.step()
    assert parameter.tolist() == [[0.0, -0.5]]


@pytest.mark.parametrize("seed", range(3))
def test_a_record_counts_at_most_the_threshold_whatever_it_is(seed):
    """Two worlds that differ in one record, at any loss scale; the noise is the same."""
    stack = make_stack("bert", 1, SHORT + 8 * (seed % 2))
    scale = 10.0 ** (4 * seed - 4)
    found = []
    for real in (torch.ones(1, OWN, dtype=torch.bool), torch.tensor([[True, False, True]])):
        stack.model.load(stack.values, TRAINED)
        thresholds, before = (0.3, 0.4, 1.2), values(stack)
        step = stack.step(thresholds, SIGMA)
        with step.open():
            step([PartialBatch(scale * stack.losses(), real)])
        found.append(moved(stack, before))
    apart = sum((found[0][n] - found[1][n]).square().sum() for n in found[0]).sqrt()
    assert 0 < apart <= 1.3 * (1 + 1e-9)


def in_parts(stack: Stack, real: Tensor, size: int) -> Iterator[PartialBatch]:
    """Each part is made when it is asked for, as in training."""
    rows = torch.arange(len(stack.rows.ids)).view(stack.clients, OWN)
    for first in range(0, OWN, size):
        chosen = rows[:, first : first + size]
        losses = stack.losses(stack.rows[chosen.flatten()])
        yield PartialBatch(losses, real[:, first : first + size])


@pytest.mark.parametrize("kind", ["lora", "vera"])
@pytest.mark.parametrize("size", [1, 2])
def test_a_batch_in_parts_takes_one_step_with_one_noise(kind, size):
    stack, real, found = make_stack("bert", 4, LONG, kind), some_real(4), []
    for rows in (size, OWN):
        stack.model.load(stack.values, TRAINED)
        before, step = values(stack), stack.step((0.05,), SIGMA)
        with step.open():
            step(in_parts(stack, real, rows))
        found.append(moved(stack, before))
    check_equal(found[0], found[1])


def test_an_empty_batch_still_takes_a_noised_step():
    stack = make_stack("bert", 2)
    nobody, before = torch.zeros(2, OWN, dtype=torch.bool), values(stack)
    zeros = {name: torch.zeros_like(p) for name, p in before.items()}
    step = stack.step((0.5,), SIGMA, expected=[1.0, 1.0])
    with step.open():
        step(one_part(stack, nobody))
    check_equal(moved(stack, before), noised(stack, zeros, SIGMA * 0.5))


def test_every_step_has_noise_of_its_own_and_every_client_too():
    stack = make_stack("bert", 2)
    nobody = torch.zeros(2, OWN, dtype=torch.bool)
    step, seen = stack.step((0.5,), SIGMA, expected=[1.0, 1.0]), []
    with step.open():
        for number in range(3):
            before = values(stack)
            step(one_part(stack, nobody))
            flat = [d.flatten(1) for d in moved(stack, before).values()]
            drawn = torch.cat(flat, 1) / (SIGMA * 0.5)
            for client, secret in enumerate(secrets(2)):
                expected = torch.from_numpy(secret.gaussian(f"step {number}", drawn.shape[1]))
                assert (drawn[client] - expected).abs().max() < 1e-9
            seen += list(drawn)
    assert len({tuple(one[:3].tolist()) for one in seen}) == 6


@pytest.mark.parametrize("steps", [[0.0, 0.0], [0.0, 7.0]], ids=str)
def test_every_client_has_step_counts_of_its_own(steps):
    """Adam's first step is longer than its eighth; the expectation is each client alone."""
    stack, settings = make_stack("bert", 2), OptimizerSettings(kind="adamw")
    stream = torch.Generator().manual_seed(11)
    rates = dict.fromkeys(stack.parameters, 1e-2)

    def state(counts: Sequence[float]) -> OptimizerState:
        stream.manual_seed(11)
        moments = {
            f"{name}#{kind}": torch.rand(p.shape, generator=stream, dtype=p.dtype)
            for name, p in stack.parameters.items()
            for kind in settings.moments
        }
        return OptimizerState(moments, torch.tensor(counts))

    alone, real = stack.alone(), some_real(2)
    groups = groups_of(stack, joint=True)
    sums = expected_sums(stack, alone, groups, real=real, thresholds=[0.05])
    gradients, expected = noised(stack, sums, SIGMA * 0.05), []
    for client, count in enumerate(steps):
        own = {n: nn.Parameter(p[client : client + 1].clone()) for n, p in values(stack).items()}
        for name, parameter in own.items():
            parameter.grad = gradients[name][client : client + 1] / (1.0 + client)
        moments = {n: m[client : client + 1].clone() for n, m in state([0.0]).moments.items()}
        optimizer_step(own, rates, OptimizerState(moments, torch.tensor([count])), settings)
        expected.append({name: p.detach()[0] for name, p in own.items()})
    taken = state(steps)
    optimizer = StackedOptimizer(stack.parameters, taken, settings)
    optimizer.rates = rates
    step = stack.step((0.05,), SIGMA, optimizer)
    with step.open():
        step(one_part(stack, real))
    assert taken.steps.tolist() == [count + 1 for count in steps]
    check_equal(values(stack), {n: torch.stack([e[n] for e in expected]) for n in rates})


def traces(model: nn.Module) -> dict[str, object]:
    """Attributes, hooks and switches of all modules and parameters."""
    found: dict[str, object] = {}
    for name, module in model.named_modules():
        hooks = {key: len(value) for key, value in vars(module).items() if key.endswith("_hooks")}
        found[f"module {name}"] = (sorted(vars(module)), hooks, module.training)
    for name, p in model.named_parameters():
        found[f"parameter {name}"] = (sorted(vars(p)), p.grad is None, p.requires_grad)
    return found


def broken_parts(
    stack: Stack, real: Tensor, after: int, dangling: bool = True
) -> Iterator[PartialBatch]:
    """Parts of one row per client, of which one cannot be read: after its forward pass, or not."""
    parts = in_parts(stack, real, 1)
    for _ in range(after):
        yield next(parts)
    if dangling:
        next(parts)
    raise OSError("the rows cannot be read")


@pytest.mark.parametrize("name", ["bert", "albert"])
@pytest.mark.parametrize("after", [None, 0, 1, 2])
def test_nothing_of_the_hooks_stays_behind(name, after):
    """Also when a step fails half way, with forward passes without backward passes."""
    stack = make_stack(name, 2)
    real, before = some_real(2), traces(stack.model.model)
    step = stack.step((0.05,), SIGMA)
    if after is None:
        with step.open():
            step(one_part(stack, real))
    else:
        with pytest.raises(OSError, match="cannot be read"), step.open():
            step(broken_parts(stack, real, after))
    stack.losses()
    assert traces(stack.model.model) == before


@pytest.mark.parametrize("after", [1, 2])
def test_nothing_of_a_step_that_failed_counts_in_the_next(after):
    """Its clipped sums would otherwise be added: a record could count twice for one noise."""
    real, found = some_real(2), []
    for fails in (True, False):
        stack = make_stack("bert", 2)
        before, step = values(stack), stack.step((0.05,), SIGMA)
        with step.open():
            if fails:
                with pytest.raises(OSError, match="cannot be read"):
                    step(broken_parts(stack, real, after, dangling=False))
            step(in_parts(stack, real, 2))
        found.append(moved(stack, before))
    check_equal(found[0], found[1], 1e-12)


def test_a_step_opens_again_after_one_that_failed():
    real, found = some_real(2), []
    for fails in (True, False):
        stack = make_stack("bert", 2)
        before, step = values(stack), stack.step((0.05,), SIGMA)
        if fails:
            with pytest.raises(OSError, match="cannot be read"), step.open():
                step(broken_parts(stack, real, 2))
        with step.open():
            step(one_part(stack, real))
        found.append(moved(stack, before))
    check_equal(found[0], found[1], 1e-12)


def test_nothing_of_an_evaluation_between_steps_counts():
    real, found = some_real(2), []
    for evaluates in (True, False):
        stack = make_stack("bert", 2)
        before, step = values(stack), stack.step((0.05,), SIGMA)
        with step.open():
            if evaluates:
                with torch.no_grad():
                    stack.losses()
            step(one_part(stack, real))
        found.append(moved(stack, before))
    check_equal(found[0], found[1], 1e-12)


class Elsewhere(torch.optim.SGD):
    """Steps on copies, as an optimizer does whose tensors were replaced (opacus#820)."""

    def step(self, closure: None = None) -> None:
        copies = [p.detach().clone() for p in self.param_groups[0]["params"]]
        for copy in copies:
            copy.sub_(1.0)


def test_an_optimizer_that_moves_nothing_of_the_model_is_refused():
    stack = make_stack("bert", 1)
    for optimizer in (
        Elsewhere(stack.parameters.values(), lr=1.0),
        torch.optim.SGD(stack.parameters.values(), lr=0.0),
    ):
        step = stack.step((0.05,), SIGMA, optimizer)
        with step.open(), pytest.raises(PrivacyError, match="moved no parameter"):
            step(one_part(stack, some_real(1)))


def test_what_is_trained_has_to_be_noised_and_what_is_noised_trained():
    stack = make_stack("bert", 1)
    parts = {role: tuple(stack.model.parameters([role]).values()) for role in TRAINED}

    def step(groups: Sequence[ClipGroup], trained: Sequence[nn.Parameter]) -> PrivateStep:
        return PrivateStep(
            stack.model.model,
            groups,
            torch.optim.SGD(trained, lr=1.0),
            noise_multiplier=SIGMA,
            expected_batches=torch.ones(1),
            secrets=secrets(1),
        )

    for role, own in parts.items():
        others = [ClipGroup(p, 1.0) for other, p in parts.items() if other != role]
        trained = [p for group in others for p in group.parameters]
        name = next(n for n, p in stack.model.model.named_parameters() if p is own[0])
        with pytest.raises(PrivacyError, match=f"{name}: it is trained without noise"):
            step(others, trained)
    everything = [ClipGroup(p, 1.0) for p in parts.values()]
    with pytest.raises(ValueError, match="one clip group"):
        step(everything, list(parts[TRAINED[0]]))
    with pytest.raises(ValueError, match="one clip group"):
        step([*everything, everything[0]], [p for own in parts.values() for p in own])


def test_a_longer_record_beside_it_moves_no_other_records_contribution():
    """Its own token mean, its own norm: the sums differ by the changed record's clipped gradient.

    With the batch's mean over tokens the others' gradients would shrink before they are clipped.
    """
    stack = make_stack("gpt2", 1)
    everybody = torch.ones(1, OWN, dtype=torch.bool)
    without = everybody.clone()
    without[0, -1] = False
    sums = []
    for ids, real in ((stack.rows, everybody), (longer(stack.rows), everybody), (None, without)):
        stack.model.load(stack.values, stack.trained)
        before, step = values(stack), stack.step((1e-3,), 0.0, expected=[1.0])
        with step.open():
            step([PartialBatch(stack.losses(ids), real)])
        sums.append(moved(stack, before))
    for with_it in sums[:2]:
        own = sum((with_it[n] - sums[2][n]).square().sum() for n in with_it).sqrt()
        assert own == pytest.approx(1e-3, rel=1e-9)


def longer(rows: Rows) -> Rows:
    """The last row at full length."""
    from private_stacks import next_tokens

    found = rows.clone()
    found.ids[-1] = 2 + torch.arange(rows.ids.shape[1])
    return Rows(found.ids, next_tokens(found.ids))
