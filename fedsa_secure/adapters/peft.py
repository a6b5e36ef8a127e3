"""Write adapters in the form that ``peft.PeftModel.from_pretrained`` reads."""

from pathlib import Path

from peft import LoraConfig
from safetensors.torch import save

from fedsa_secure.adapters.attach import AdaptedModel
from fedsa_secure.adapters.pretrained import public_name
from fedsa_secure.types import NamedTensors, Role


def peft_state(adapted: AdaptedModel, tensors: NamedTensors) -> NamedTensors:
    """One client's tensors under the names that PEFT gives them in a file.

    Args:
        adapted: the model that the tensors belong to.
        tensors: one client's A, B and head, without client axis; what is missing is at its
            public start.
    """
    state = NamedTensors()
    for name in adapted.names([Role.A, Role.B]):
        path, _, factor = name.rpartition(".")
        peft_name = f"base_model.model.{path}.lora_{factor}.weight"
        state[peft_name] = tensors.get(name, adapted.initial[name]).contiguous()
    for name in adapted.names([Role.HEAD]):
        state[f"base_model.model.{name}"] = tensors.get(name, adapted.initial[name]).contiguous()
    return state


def save_peft_adapter(
    adapted: AdaptedModel, tensors: NamedTensors, folder: Path, base_model: str
) -> None:
    """Write one client's adapter and head as a PEFT folder.

    The head always goes into ``modules_to_save`` by name, since PEFT's automatic choice misses
    some heads. Load it with the base model built for the same number of labels::

        base = AutoModelForSequenceClassification.from_pretrained(base_model, num_labels=n)
        model = PeftModel.from_pretrained(base, folder)

    Args:
        adapted: the model that the tensors belong to.
        tensors: as for ``peft_state``.
        folder: made if it does not exist.
        base_model: what PEFT notes as the base model.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = peft_state(adapted, tensors)
    (folder / "adapter_model.safetensors").write_bytes(save(state, metadata={"format": "pt"}))
    peft_config(adapted, base_model).save_pretrained(str(folder))


def peft_config(adapted: AdaptedModel, base_model: str) -> LoraConfig:
    """The PEFT configuration of the adapters in a model."""
    targets = [name.rpartition(".")[0] for name in adapted.names([Role.A])]
    heads = sorted({name.split(".")[0] for name in adapted.names([Role.HEAD])})
    config = LoraConfig(
        task_type="SEQ_CLS",
        base_model_name_or_path=public_name(base_model),
        inference_mode=True,
        r=adapted.settings.rank,
        lora_alpha=adapted.settings.alpha,
        lora_dropout=adapted.settings.dropout,
        modules_to_save=heads or None,
    )
    # By full path, so that no other layer matches. PEFT turns a list into a set when it is given
    # to the constructor, whose order would differ from one process to the next.
    config.target_modules = sorted(targets)
    return config
