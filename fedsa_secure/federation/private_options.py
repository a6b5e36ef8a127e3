"""Which options go with differential privacy. docs/privacy.md."""

import math

from fedsa_secure.config import TrainConfig
from fedsa_secure.errors import ConfigError, PrivacyError
from fedsa_secure.methods import Method
from fedsa_secure.types import Role


def check_private_options(config: TrainConfig, method: Method, records: list[int]) -> None:
    """Refuse what would break the promise, or make it mean nothing.

    Args:
        config: the resolved configuration, with ``dp_epsilon``.
        method: what is trained and shared.
        records: train rows of each client; public.

    Raises:
        PrivacyError: naming the setting.
    """
    if not method.shared:
        raise PrivacyError(
            "dp_epsilon",
            f"with method {method.name!r} nothing leaves a client, so there is nothing to protect",
            "leave dp_epsilon out",
        )
    if config.weighting != "uniform":
        raise PrivacyError(
            "weighting",
            "a weight that depends on a client's rows is part of what is released and has no noise",
            "use weighting='uniform'",
        )
    _check_delta(config, records)
    if config.dp_unit == "record":
        _check_record_level(config, method)
    else:
        _check_client_level(config)


def _check_delta(config: TrainConfig, records: list[int]) -> None:
    most = max(records) if config.dp_unit == "record" else len(records)
    if config.dp_delta >= 1 / most:
        units = "records of a client" if config.dp_unit == "record" else "clients"
        raise PrivacyError(
            "dp_delta",
            f"{config.dp_delta:g} is not below one over {most} {units}: publishing one of them "
            "whole would be allowed",
            f"give less than {_rounded_down(1 / most):g}",
        )


def _rounded_down(value: float) -> float:
    """To one digit."""
    digit = 10.0 ** math.floor(math.log10(value))
    return math.floor(value / digit) * digit


def _check_record_level(config: TrainConfig, method: Method) -> None:
    if config.dp_metrics is not None and config.task == "generation":
        raise PrivacyError(
            "dp_metrics",
            "a noised count of right answers is for classification",
            "leave the option out",
        )
    if config.dp_noise == "distributed":
        raise PrivacyError(
            "dp_noise",
            "noise that is spread over clients covers a sum, but the steps between two sums are "
            "kept by the client with less noise than is claimed, and feed the next ones",
            "use dp_noise='local', or dp_unit='client'",
        )
    if config.dp_release == "frozen-b" and not (
        Role.A in method.shared and Role.B in method.personal and not method.has_private_adapter
    ):
        raise PrivacyError(
            "dp_release",
            f"'frozen-b' needs a method that shares A and keeps B, and {method.name!r} does not",
            "use dp_release='twin'",
        )
    for name, other in (("gradient_checkpointing", False), ("compile", False)):
        if getattr(config, name) != other:
            raise PrivacyError(
                name,
                "gradients of single records are caught in one plain forward and backward pass",
                f"set {name}={other}",
            )


def _check_client_level(config: TrainConfig) -> None:
    given = config.model_fields_set
    for name in ("dp_release", "dp_sampling_rate", "dp_clip_weights", "dp_control", "dp_metrics"):
        if name in given and getattr(config, name) != type(config).model_fields[name].default:
            if name == "dp_sampling_rate" and config.dp_sampling_rate is None:
                continue
            raise PrivacyError(
                name, "it is of no use with dp_unit='client'", "leave it out, or use 'record'"
            )
    if config.dp_noise == "local":
        return
    if not config.secure_aggregation or config.threat != "malicious":
        raise PrivacyError(
            "dp_noise",
            "'distributed' noise protects a client only inside a sum, and needs all steps of the "
            "protocol: else the server sees an update with a share of the noise",
            "keep secure_aggregation=True and threat='malicious', or use dp_noise='local'",
        )
    if config.update_range is not None:
        raise ConfigError(
            "update_range",
            "the grid of 'distributed' noise follows from the noise",
            "leave the option out",
        )
