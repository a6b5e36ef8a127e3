"""Lemma 1 of Guo et al. (ICLR 2025, arXiv 2410.01463): why A is shared and B is not.

Least squares, E‖ΔW·x - B·A·x‖². With B fixed at U the best A is (UᵀU)⁻¹·Uᵀ·ΔW, whatever the
distribution of x. With A fixed at Q the best B is ΔW·S·Qᵀ·(Q·S·Qᵀ)⁻¹, which depends on it through
S = E[x·xᵀ].
"""

from dataclasses import dataclass
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from fedsa_kernels import lora_linear
from fedsa_secure.federation.optimizers import OptimizerSettings, OptimizerState, optimizer_step
from fedsa_secure.federation.schedule import rate_factor

CLIENTS, ROWS, D_IN, D_OUT, RANK = 4, 20, 9, 7, 3
STEPS = 600
OPTIMIZERS = [OptimizerSettings(kind="sgd", momentum=0.9), OptimizerSettings(kind="adamw")]
PEAK_OF_ADAM = 0.8
Factor = Literal["A", "B"]


@dataclass(frozen=True)
class Problem:
    """Finite samples with exact second moments, one linear target per client, and fixed factors.

    Shapes: x [client, row, d_in], S [client, d_in, d_in], target [client, d_out, d_in],
    U [client, d_out, r], Q [client, r, d_in].
    """

    x: Tensor
    S: Tensor
    target: Tensor
    U: Tensor
    Q: Tensor

    def best_a(self) -> Tensor:
        """The closed form for B = U, of which S is no part. [client, r, d_in]"""
        return torch.linalg.inv(self.U.mT @ self.U) @ self.U.mT @ self.target

    def best_b(self) -> Tensor:
        """The closed form for A = Q. [client, d_out, r]"""
        return self.target @ self.S @ self.Q.mT @ torch.linalg.inv(self.Q @ self.S @ self.Q.mT)

    def losses(self, A: Tensor, B: Tensor) -> Tensor:
        """Each client's mean over its rows, by the op that the adapters use. [client]"""
        x = self.x.flatten(0, 1)
        y = lora_linear(x, x.new_zeros(D_OUT, D_IN), None, A, B, 1.0)
        errors = y.view(CLIENTS, ROWS, D_OUT) - self.x @ self.target.mT
        return errors.square().sum(2).mean(1)

    def stiffest(self, trained: Factor) -> float:
        """The largest curvature of any client's loss in the trained factor."""
        if trained == "A":  # 2·UᵀU ⊗ S
            largest = [torch.linalg.eigvalsh(m).amax(1) for m in (self.U.mT @ self.U, self.S)]
            return 2 * float((largest[0] * largest[1]).max())
        return 2 * float(torch.linalg.eigvalsh(self.Q @ self.S @ self.Q.mT).max())


def draw(seed: int, *shape: int) -> Tensor:
    stream = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=stream, dtype=torch.float64)


def orthonormal(seed: int, rows: int, columns: int) -> Tensor:
    """Orthonormal columns, other ones for every client. [client, rows, columns]"""
    return torch.linalg.qr(draw(seed, CLIENTS, rows, columns))[0]


def make_problem(*, own_target: bool = False, own_u: bool = False) -> Problem:
    """Clients with inputs of their own; they share ΔW and U unless asked otherwise; Q is shared."""
    spreads = torch.linspace(0.5, 2.0, D_IN, dtype=torch.float64)  # standard deviations
    roots = orthonormal(1, D_IN, D_IN) * spreads  # S = root·rootᵀ
    x = ROWS**0.5 * orthonormal(2, ROWS, D_IN) @ roots.mT
    target, Q = draw(3, CLIENTS, D_OUT, D_IN), draw(4, RANK, D_IN)
    U = orthonormal(5, D_OUT, RANK) + 0.2 * draw(6, CLIENTS, D_OUT, RANK)
    return Problem(
        x=x,
        S=roots @ roots.mT,
        target=target if own_target else target[:1].repeat(CLIENTS, 1, 1),
        U=U if own_u else U[:1].repeat(CLIENTS, 1, 1),
        Q=Q.repeat(CLIENTS, 1, 1),
    )


def train(problem: Problem, trained: Factor, settings: OptimizerSettings) -> Tensor:
    """All clients in one stack from random starts of their own, the other factor fixed."""
    start = draw(7, CLIENTS, RANK, D_IN) if trained == "A" else draw(7, CLIENTS, D_OUT, RANK)
    factor = nn.Parameter(start.clone())
    moments = {f"{trained}#{moment}": torch.zeros_like(start) for moment in settings.moments}
    state = OptimizerState(moments, torch.zeros(CLIENTS, dtype=torch.float64))
    for step in range(STEPS):
        factor.grad = None
        A, B = (factor, problem.U) if trained == "A" else (problem.Q, factor)
        problem.losses(A, B).sum().backward()
        rate = 1 / problem.stiffest(trained)
        if settings.kind == "adamw":  # whose steps get no smaller near the end
            rate = PEAK_OF_ADAM * rate_factor("cosine", step, STEPS)
        optimizer_step({trained: factor}, {trained: rate}, state, settings)
    return factor.detach()


def relative_distances(tensors: Tensor) -> Tensor:
    """‖t_i - t_j‖ / ‖t_i‖ for every two clients i and j. [client · (client - 1)]"""
    flat = tensors.flatten(1)
    distances = torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist")
    return (distances / flat.norm(dim=1, keepdim=True))[~torch.eye(CLIENTS, dtype=torch.bool)]


def assert_equal(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def test_the_samples_have_the_stated_second_moments() -> None:
    problem = make_problem()
    torch.testing.assert_close(problem.x.mT @ problem.x / ROWS, problem.S, rtol=1e-12, atol=1e-12)
    eigenvalues = torch.linalg.eigvalsh(problem.S)
    assert (eigenvalues.amin(1) > 0.2).all()
    assert (eigenvalues.amax(1) / eigenvalues.amin(1) > 10).all()
    assert relative_distances(problem.S).min() > 0.3


@pytest.mark.parametrize("own_target", [False, True], ids=["common target", "own targets"])
@pytest.mark.parametrize("own_u", [False, True], ids=["common U", "own U"])
def test_the_gradient_vanishes_at_the_closed_forms(own_target: bool, own_u: bool) -> None:
    problem = make_problem(own_target=own_target, own_u=own_u)
    for best, other, order in (
        (problem.best_a(), problem.U, lambda free, fixed: (free, fixed)),
        (problem.best_b(), problem.Q, lambda free, fixed: (fixed, free)),
    ):
        gradients = []
        for point in (best, best.roll(1, 0) + 0.01 * best):
            free = point.clone().requires_grad_()
            loss = problem.losses(*order(free, other)).sum()
            gradients.append(torch.autograd.grad(loss, free)[0].abs().amax((1, 2)))
        assert gradients[0].max() < 1e-12
        assert gradients[1].min() > 1e-2  # the loss is not flat


each_optimizer = pytest.mark.parametrize("settings", OPTIMIZERS, ids=lambda s: s.kind)


@each_optimizer
def test_training_a_ends_at_one_a_for_all_clients(settings: OptimizerSettings) -> None:
    problem = make_problem()
    trained = train(problem, "A", settings)
    assert_equal(trained, problem.best_a())
    assert relative_distances(trained).max() < 1e-9


@each_optimizer
def test_training_b_ends_at_a_b_of_each_clients_own(settings: OptimizerSettings) -> None:
    problem = make_problem()
    trained = train(problem, "B", settings)
    assert_equal(trained, problem.best_b())
    assert relative_distances(trained).min() > 0.2


@pytest.mark.parametrize("own", ["own_target", "own_u"])
def test_a_is_common_only_where_the_target_and_b_are(own: str) -> None:
    """The limit of the lemma: other targets (concept shift), or another fixed B, move A too."""
    problem = make_problem(**{own: True})
    trained = train(problem, "A", OPTIMIZERS[0])
    assert_equal(trained, problem.best_a())
    assert relative_distances(trained).min() > 0.2
