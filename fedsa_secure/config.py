"""Every option of a run, once: keyword arguments, command line and TOML all come from here."""

import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from fedsa_secure.csprng import MaskGenerator
from fedsa_secure.errors import ConfigError, did_you_mean


def _names(value: Any) -> Any:
    """Accept ``"a,b"`` for ``("a", "b")``, as the command line gives it."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return value


Names = Annotated[tuple[str, ...], BeforeValidator(_names), Field(min_length=1)]


def _rate_or_names(value: Any) -> Any:
    """Accept a number as the command line gives it, or else names."""
    try:
        return float(value)
    except (TypeError, ValueError):
        names = _names(value)
    if not (isinstance(names, list | tuple) and names and all(isinstance(n, str) for n in names)):
        raise ValueError("give a rate, 0 for none, or ROUND:CLIENT:STEP,…")
    return tuple(names)


Dropouts = Annotated[
    Annotated[float, Field(ge=0, lt=1)] | tuple[str, ...], BeforeValidator(_rate_or_names)
]
Passes = Annotated[int, Field(ge=1)] | Literal["auto"]
AdapterKind = Literal["lora", "rslora", "vera"]
_KINDS: tuple[AdapterKind, ...] = ("rslora", "vera", "lora")


def _rank(options: dict[str, Any]) -> int:
    """VeRA trains so few numbers per rank that its ranks are larger (its paper takes 256)."""
    return 256 if options.get("adapter") == "vera" else 8


def _weights(value: Any) -> Any:
    """Accept ``"1,1,0.5"`` as the command line gives it."""
    if isinstance(value, str) and value != "joint":
        return tuple(part.strip() for part in value.split(","))
    return value


_Weight = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Weights = Annotated[tuple[_Weight, _Weight, _Weight], BeforeValidator(_weights)]


def _noised_records(options: dict[str, Any]) -> bool:
    return options.get("dp_epsilon") is not None and options.get("dp_unit") == "record"


def _sampling_rate(options: dict[str, Any]) -> float | None:
    """Little noise pays for large batches (docs/privacy.md)."""
    if not _noised_records(options):
        return None
    return 0.25 if options["dp_epsilon"] > 3 else 0.125


def _local_steps(options: dict[str, Any]) -> int:
    """Few steps with large batches and little noise are worth more (docs/privacy.md)."""
    return 2 if _noised_records(options) else 5


def _learning_rate(options: dict[str, Any]) -> float:
    """So few steps have to be long ones (docs/privacy.md, "What it costs")."""
    if options.get("adapter") == "vera":
        return 0.1
    return 8e-3 if _noised_records(options) else 4e-3


class TrainConfig(BaseModel):
    """One run, completely described. Immutable; unknown options are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    # What is trained
    model: str = Field(
        "minilm",
        description="hub id or local folder of a transformers model, or a .gguf file; "
        "'minilm' is the embedded one",
    )
    task: Literal["auto", "classification", "generation"] = Field(
        "auto",
        description="auto: generation where the data have prompts and answers and no label",
    )
    method: str = Field(
        "fedsa", description="what is trained and what is shared (fedsa, fedavg, local, …)"
    )
    adapter: AdapterKind = Field("lora", description="lora, rslora or vera")
    rank: int = Field(
        default_factory=_rank,
        ge=1,
        le=1024,
        description="rank r of the adapters [default: 8; vera: 256]",
    )
    alpha: float = Field(
        16.0,
        gt=0,
        description="the scaling is alpha / rank (lora) or alpha / √rank (rslora); vera has none",
    )
    dropout: float = Field(0.05, ge=0, lt=1, description="dropout on the adapter's input")
    target_modules: Names | None = Field(
        None, description="linear layers to adapt, by name; the default is PEFT's per architecture"
    )
    head: Literal["local", "frozen", "shared"] = Field(
        "local",
        description="the task head: personal, public and frozen, or averaged; models that "
        "generate have none",
    )
    initial_adapter: str | None = Field(
        None,
        description="hub id or folder of a PEFT adapter whose values are the public start",
    )

    # On which data
    dataset: str = Field(
        "lexicon",
        description="hub id, or local folder or file of parquet, csv, jsonl or save_to_disk data; "
        "'lexicon' is the embedded one",
    )
    subset: str | None = Field(None, description="configuration name of the data set (GLUE: 'rte')")
    split: str = Field("train", description="split that is partitioned over the clients")
    common_split: str | None = Field(
        None, description="split for the common test; by default validation or test if there is one"
    )
    text_column: Names | None = Field(None, description="column of the text, or two for a pair")
    label_column: str | None = Field(
        None, description="column of the label; with task='generation' only the partition reads it"
    )
    label_names: Names | None = Field(
        None,
        description="classes in order; default: those that the data set declares, or that occur in "
        "it (with dp_epsilon they have to be declared)",
    )
    answer_column: str | None = Field(
        None, description="generation: column of the answer (prompt: text_column); or 'messages'"
    )
    prompt_template: str | None = Field(
        None,
        description="generation: text with {prompt} in it; default: the tokenizer's chat template",
    )
    group_column: str | None = Field(
        None, description="rows with equal value here never stand on both sides of a split"
    )
    max_length: int = Field(128, ge=2, description="longest sequence in tokens")
    max_rows: int | None = Field(None, ge=2, description="use at most this many rows of the split")
    common_rows: int = Field(
        400, ge=0, description="rows of the common, class-balanced test (0: none)"
    )

    # Clients
    clients: int | None = Field(
        None, ge=1, description="number of clients (default 10; 'column:NAME' counts its values)"
    )
    partition: str = Field(
        "auto",
        description="iid, dirichlet:ALPHA, pathological:CLASSES, column:NAME, or length (of the "
        "text, or of the answer); auto: dirichlet:0.5 where there are labels, else iid",
    )
    min_rows: int = Field(
        2, ge=2, description="fewest rows of a client; dirichlet is drawn again until it holds"
    )
    test_fraction: float = Field(0.2, gt=0, lt=1, description="share of a client's rows kept back")
    participation: float = Field(1.0, gt=0, le=1, description="share of clients in a round")

    # What one record, or one client, may be known by (docs/privacy.md)
    dp_epsilon: float | None = Field(
        None,
        gt=0,
        le=1e4,
        description="differential privacy: most that a run may tell of a record of a client, "
        "against the server and everyone else (docs/privacy.md)",
    )
    dp_delta: float = Field(
        1e-5, gt=0, lt=1, description="probability that dp_epsilon does not cover; below 1 / rows"
    )
    dp_unit: Literal["record", "client"] = Field(
        "record", description="who is protected: a record of a client, or a whole client"
    )
    dp_release: Literal["twin", "frozen-b"] = Field(
        "twin",
        description="record: what is trained with noise beside A; a private twin of B and head, or "
        "with B frozen at a public random matrix",
    )
    dp_noise: Literal["local", "distributed"] = Field(
        "local",
        description="client: every client adds all of the noise, or a share of it inside secure "
        "aggregation",
    )
    dp_noise_multiplier: float | None = Field(
        None,
        gt=0,
        le=1e6,
        description="noise over sensitivity; more than needed is allowed [default: calibrated to "
        "dp_epsilon]",
    )
    dp_clip_norm: float = Field(
        0.1, gt=0, description="bound on the norm of a record's gradient, or of a client's update"
    )
    dp_clip_weights: Weights | Literal["joint"] = Field(
        (1.0, 1.0, 1.0),
        description="record: parts of A, B and head in the clip norm, scaled to a sum of squares "
        "of 1, or 'joint' for one norm over all three",
    )
    dp_sampling_rate: float | None = Field(
        default_factory=_sampling_rate,
        gt=0,
        le=1,
        description="record: probability of a record to be in a step [default: 1/4; 1/8 for "
        "dp_epsilon up to 3]",
    )
    dp_dataset_id: str | None = Field(
        None,
        description="name under which the silo counts what its data set has spent over all runs "
        "[default: dataset]",
    )
    dp_lifetime_epsilon: float | None = Field(
        None, gt=0, description="most that all runs on the data set may spend together"
    )
    dp_home: str | None = Field(
        None,
        description="folder of the ledgers of data sets [default: $FEDSA_SECURE_HOME, or "
        "~/.fedsa_secure]",
    )
    dp_metrics: Literal["noised"] | None = Field(
        None,
        description="noised: every evaluated round clients also send how many test rows their twin "
        "gets right, with noise; else no metric leaves a client",
    )
    dp_control: Literal["noise"] | None = Field(
        None, description="noise: a control whose private part sees no data, only noise"
    )
    dp_test_seed: int | None = Field(
        None,
        ge=0,
        lt=2**63,
        description="for tests: noise and coins from this number; the run is then not private",
    )
    personal_steps: int = Field(
        40,
        ge=0,
        description="record: steps of the personal B and head after the last round, on top of the "
        "released A, without noise",
    )

    # How long and how fast
    rounds: int = Field(10, ge=1, description="communication rounds")
    local_steps: int = Field(
        default_factory=_local_steps,
        ge=1,
        description="optimizer steps of a client in a round [default: 5; 2 with dp_epsilon]",
    )
    batch_size: int = Field(16, ge=1, description="rows in a step")
    gradient_accumulation: int = Field(
        1, ge=1, description="parts that a step's rows are worked off in; the step stays the same"
    )
    optimizer: Literal["sgd", "adamw"] = Field("adamw", description="local optimizer")
    learning_rate: float = Field(
        default_factory=_learning_rate,
        gt=0,
        description="peak learning rate; the default suits small models with adamw [default: "
        "0.004; records with dp_epsilon: 0.008; vera: 0.1]",
    )
    head_learning_rate: float | None = Field(
        default_factory=lambda given: 4e-3 if given.get("adapter") == "vera" else None,
        gt=0,
        description="peak learning rate of the head [default: learning_rate; vera: 0.004]",
    )
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "linear", description="decay of the learning rate over the whole run"
    )
    warmup_steps: int = Field(
        0, ge=0, description="local steps of the whole run in which the learning rate rises"
    )
    momentum: float = Field(0.0, ge=0, lt=1, description="momentum of sgd")
    weight_decay: float = Field(0.0, ge=0, description="decoupled weight decay")
    max_grad_norm: float | None = Field(
        1.0, gt=0, description="bound on the norm of a client's gradient; none to switch off"
    )

    # What the server sees (docs/protocol.md)
    secure_aggregation: bool = Field(
        True, description="the server learns sums only; needs 3 clients in a round"
    )
    threat: Literal["malicious", "honest-but-curious"] = Field(
        "malicious",
        description="what the server is feared to do; the weaker one saves an exchange a round",
    )
    mask_generator: MaskGenerator = Field(
        "aes-256-ctr",
        description="what masks are made with, the same for all clients; chacha20 is the one that "
        "kernels can make",
    )
    colluders: int | None = Field(
        None,
        ge=0,
        description="clients of a round that may collude with the server [default: a third]",
    )
    threshold: int | None = Field(
        None,
        ge=1,
        description="clients that have to be there to the end of a round [default: the smallest "
        "that is safe]",
    )
    min_survivors: int | None = Field(
        None, ge=3, description="fewest clients in a sum [default: threshold]"
    )
    max_attempts: int = Field(
        3, ge=1, le=15, description="how often a round is tried before it is given up"
    )
    weighting: Literal["uniform", "samples"] = Field(
        "uniform", description="what a client's update counts: the same, or its training rows"
    )
    weight_cap: int | None = Field(
        None, ge=1, le=2**20, description="weighting by samples: most rows that count; public"
    )
    update_range: float | None = Field(
        None,
        ge=1e-30,
        le=1e30,
        description="largest change of a shared value in a round; larger ones are clipped "
        "[default: what the optimizer cannot exceed]",
    )
    dropouts: Dropouts = Field(
        0.0,
        description="clients that fail in the simulation: a rate, or ROUND:CLIENT:STEP,… with STEP "
        "one of advertise_keys, share_keys, masked_input, consistency, unmask",
    )

    # How it is run
    seed: int = Field(0, ge=0, lt=2**63, description="root of all public random draws")
    clients_per_pass: Passes = Field("auto", description="clients stacked into one forward pass")
    client_state: Literal["memory", "disk"] = Field(
        "memory", description="where the clients' personal state waits between its turns"
    )
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="bf16: products under autocast; what is trained stays in fp32"
    )
    gradient_checkpointing: bool = Field(
        False, description="keep fewer activations and compute them again: less memory, more time"
    )
    compile: bool = Field(False, description="let torch.compile make the passes")
    evaluate_every: int = Field(5, ge=1, description="rounds between evaluations")
    cross_rows: int = Field(
        400,
        ge=0,
        description="other clients' test rows on which each model is tried (0: none)",
    )
    decode_rows: int = Field(
        32,
        ge=0,
        description="generation: rows of each test (own, others', common) to decode",
    )
    max_new_tokens: int = Field(256, ge=1, description="generation: longest answer in tokens")
    checkpoint_every: int = Field(1, ge=1, description="rounds between checkpoints")
    device: str = Field("auto", description="torch device; auto takes cuda where there is one")
    output_dir: str | None = Field(None, description="run folder; by default a new one below runs/")

    @model_validator(mode="after")
    def _consistent(self) -> "TrainConfig":
        if self.momentum and self.optimizer != "sgd":
            raise ValueError("momentum needs optimizer='sgd'; adamw has its own moments")
        if self.text_column is not None and len(self.text_column) > 2:
            raise ValueError("text_column takes one column, or two for a sentence pair")
        if self.label_names is not None and len(set(self.label_names)) != len(self.label_names):
            raise ValueError("label_names names a class twice")
        if self.prompt_template is not None and self.prompt_template.count("{prompt}") != 1:
            raise ValueError("prompt_template needs {prompt} in it, once")
        if (self.weighting == "samples") != (self.weight_cap is not None):
            raise ValueError(
                "weighting='samples' and weight_cap, the public bound on a weight, go together"
            )
        if self.dropouts != 0.0 and not self.secure_aggregation:
            raise ValueError("dropouts are simulated in the protocol of secure_aggregation")
        if self.dp_epsilon is None:
            self._without_privacy()
        if self.warmup_steps >= self.rounds * self.local_steps:
            raise ValueError(
                f"warmup_steps={self.warmup_steps} leaves nothing of the "
                f"{self.rounds * self.local_steps} local steps of the run"
            )
        return self

    def _without_privacy(self) -> None:
        """Options of privacy that nobody would act on are no small slip."""
        given = self.model_dump()
        for name, field in type(self).model_fields.items():
            default = field.get_default(call_default_factory=True, validated_data=given)
            if name.startswith("dp_") and given[name] != default:
                raise ValueError(f"{name} needs dp_epsilon; without it nothing is private")

    @classmethod
    def build(cls, **options: Any) -> "TrainConfig":
        """Check options given by name.

        Raises:
            ConfigError: naming the first option that is unknown or impossible.
        """
        unknown = [name for name in options if name not in cls.model_fields]
        if unknown:
            raise ConfigError(
                unknown[0], "no such option", did_you_mean(unknown[0], cls.model_fields)
            )
        try:
            return cls(**options)
        except ValidationError as error:
            raise _as_config_error(error) from None

    def replace(self, **options: Any) -> "TrainConfig":
        """A copy with some options changed, checked again."""
        return self.build(**{**self.model_dump(), **options})

    def to_toml(self) -> str:
        """TOML that ``read_options`` reads back; options that are None are left out."""
        return tomli_w.dumps(self.model_dump(mode="json", exclude_none=True) | self._switched_off())

    def _switched_off(self) -> dict[str, str]:
        """Options whose None is a choice and not the default: TOML has no null."""
        given = self.model_dump()
        return {
            name: "none"
            for name, field in type(self).model_fields.items()
            if given[name] is None
            and field.get_default(call_default_factory=True, validated_data=given) is not None
        }

    @model_validator(mode="before")
    @classmethod
    def _spelling(cls, data: Any) -> Any:
        """``none`` stands for None where there is no null; ``fedsa-rslora`` names both options."""
        if not isinstance(data, dict):
            return data
        data = {
            k: None if isinstance(v, str) and v.lower() == "none" else v for k, v in data.items()
        }
        method = data.get("method")
        for kind in _KINDS:
            if isinstance(method, str) and method.endswith(f"-{kind}"):
                given = data.setdefault("adapter", kind)
                if given != kind:
                    raise ValueError(f"method={method!r} does not go with adapter={given!r}")
                data["method"] = method.removesuffix(f"-{kind}")
                break
        return data


def _as_config_error(error: ValidationError) -> ConfigError:
    first = error.errors()[0]
    option = str(first["loc"][0]) if first["loc"] else "options"
    given = f", but {first['input']!r} was given" if first["loc"] else ""
    message = str(first["msg"]).removeprefix("Value error, ")
    return ConfigError(option, message[0].lower() + message[1:] + given)


def read_options(path: Path) -> dict[str, Any]:
    """Options from a TOML file, not yet checked.

    Raises:
        ConfigError: if the file is missing or not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            "config", f"cannot read {path}: {error.strerror}", "give the path of a TOML file"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(
            "config", f"{path} is not valid TOML: {error}", "write one 'option = value' per line"
        ) from None
