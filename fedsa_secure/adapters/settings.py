"""The shape of the adapters."""

from dataclasses import dataclass

from fedsa_secure.config import AdapterKind


@dataclass(frozen=True, kw_only=True)
class AdapterSettings:
    """What the adapters of a model have in common.

    Args:
        kind: ``lora``; ``rslora``, which differs in its scaling only; or ``vera``, whose factors
            are frozen and random, and which trains two vectors per layer.
        rank: r.
        alpha: numerator of the scaling; VeRA has none.
        dropout: probability of dropping an input element of the adapter during training.
        target_modules: names of the linear layers to adapt; None for PEFT's default.
        private: give every layer a second adapter that never leaves the client (FedDPA).
        d_initial: where VeRA's inner vector starts.
        projection_key: seed of VeRA's frozen factors; the same for all clients.
        frozen_b: start B at a public random matrix and A at zero, for B to stay as it is.
    """

    kind: AdapterKind = "lora"
    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    target_modules: tuple[str, ...] | None = None
    private: bool = False
    d_initial: float = 0.1
    projection_key: int = 0
    frozen_b: bool = False

    @property
    def scaling(self) -> float:
        """What B·A is multiplied by.

        Alpha / r (Hu et al., LoRA, §4.1), or alpha / √r (Kalajdzievski, rsLoRA, §3, theorem 3.2).
        """
        return self.alpha / (self.rank**0.5 if self.kind == "rslora" else self.rank)
