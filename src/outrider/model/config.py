"""The shape of a Llama-family model, read from and written to Hugging Face's `config.json`."""

from __future__ import annotations

from typing import Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from outrider.errors import ConfigError

T = TypeVar("T", bound=BaseModel)


class RopeScaling(BaseModel):
    """How rotary frequencies are stretched beyond the context a model was trained at.

    `linear` divides every frequency by `factor`. `llama3` (Llama 3.1) divides only the low ones, with a
    smooth transition between `low_freq_factor` and `high_freq_factor` wavelengths per original context.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    rope_type: Literal["linear", "llama3"]
    factor: float = Field(gt=0)
    low_freq_factor: float = Field(default=1.0, gt=0)
    high_freq_factor: float = Field(default=4.0, gt=0)
    original_max_position_embeddings: int = Field(default=8192, gt=0)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.rope_type == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            raise ValueError("high_freq_factor must be above low_freq_factor")
        return self


class ModelConfig(BaseModel):
    """Shape and constants of a Llama-family decoder. Names are those of Hugging Face's `LlamaConfig`.

    `num_key_value_heads` and `head_dim` default to `num_attention_heads` (multi-head attention) and
    `hidden_size / num_attention_heads`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    vocab_size: int = Field(gt=0, le=1 << 24)
    hidden_size: int = Field(gt=0, le=1 << 20)
    intermediate_size: int = Field(gt=0, le=1 << 22)
    num_hidden_layers: int = Field(gt=0, le=1_000)
    num_attention_heads: int = Field(gt=0, le=1 << 14)
    num_key_value_heads: int = Field(default=0, ge=0, description="0 means num_attention_heads")
    head_dim: int = Field(default=0, ge=0, le=1 << 14, description="0 means hidden_size / num_attention_heads")
    max_position_embeddings: int = Field(default=2048, gt=0, le=1 << 24)
    rms_norm_eps: float = Field(default=1e-5, gt=0)
    rope_theta: float = Field(default=10_000.0, gt=0)
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    initializer_range: float = Field(default=0.02, gt=0)
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _fill_defaults(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        values = dict(values)
        heads, width = values.get("num_attention_heads"), values.get("hidden_size")
        if not values.get("num_key_value_heads"):
            values["num_key_value_heads"] = heads
        heads, width = _as_integer(heads), _as_integer(width)
        if not values.get("head_dim") and isinstance(heads, int) and isinstance(width, int) and heads > 0:
            if width % heads:
                raise ValueError(
                    f"hidden_size {width} is not divisible by num_attention_heads {heads}; "
                    "change one of them or set head_dim"
                )
            values["head_dim"] = width // heads
        return values

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd; rotary embeddings need an even one")
        return self

    @property
    def num_parameters(self) -> int:
        """All parameters, a tied embedding counted once."""
        embedding = self.vocab_size * self.hidden_size
        norms = (2 * self.num_hidden_layers + 1) * self.hidden_size
        return self.num_matmul_parameters + norms + (0 if self.tie_word_embeddings else embedding)

    @property
    def num_matmul_parameters(self) -> int:
        """Parameters that take part in matrix products: blocks and head, but not the embedding look-up."""
        attention = self.hidden_size * self.head_dim * 2 * (self.num_attention_heads + self.num_key_value_heads)
        mlp = 3 * self.hidden_size * self.intermediate_size
        return self.num_hidden_layers * (attention + mlp) + self.vocab_size * self.hidden_size

    def training_flops_per_token(self, context: int) -> float:
        """Return forward and backward FLOPs per token by PaLM's convention (Chowdhery et al. 2022, app. B).

        6 x matmul parameters + 12 x layers x attention width x context; attention is not halved for
        causality and the embedding look-up is not a matmul.
        """
        width = self.num_attention_heads * self.head_dim
        return 6.0 * self.num_matmul_parameters + 12.0 * self.num_hidden_layers * width * context

    def kv_bytes_per_token(self, bytes_per_value: int) -> int:
        """Bytes that one position takes in the key-value cache."""
        return 2 * self.num_hidden_layers * self.num_key_value_heads * self.head_dim * bytes_per_value

    @classmethod
    def from_hf(cls, values: dict[str, Any]) -> ModelConfig:
        """Read the contents of a Hugging Face `config.json`.

        Raises:
            ConfigError: another architecture, a feature Outrider does not compute, or an impossible value.
        """
        if values.get("model_type") != "llama":
            raise ConfigError(
                f"model_type is {values.get('model_type')!r}; Outrider reads the Llama family ('llama')"
            )
        for feature in ("attention_bias", "mlp_bias"):
            if values.get(feature):
                raise ConfigError(f"{feature} is set; Outrider's Llama has no biases")
        if values.get("hidden_act", "silu") != "silu":
            raise ConfigError(f"hidden_act is {values['hidden_act']!r}; Outrider's Llama uses 'silu'")
        eos = values.get("eos_token_id")
        theta, scaling = _read_rope(values)
        optional = {
            key: values[key]
            for key in ("num_key_value_heads", "head_dim", "rms_norm_eps", "tie_word_embeddings",
                        "max_position_embeddings", "initializer_range", "bos_token_id")
            if values.get(key) is not None
        }
        required = {
            key: values.get(key)
            for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        }
        missing = [key for key, value in required.items() if value is None]
        if missing:
            raise ConfigError(f"config.json lacks {', '.join(missing)}")
        return validated(
            cls, {**required, **optional, "rope_theta": theta, "rope_scaling": scaling,
                  "eos_token_ids": () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,)},
            "config.json",
        )

    def to_hf(self, dtype: str = "float32") -> dict[str, Any]:
        """Return a `config.json` that `transformers` (4 and 5), llama.cpp's converter and vLLM read."""
        parameters: dict[str, Any] = {"rope_type": "default", "rope_theta": self.rope_theta}
        legacy_scaling = None
        if self.rope_scaling is not None:
            legacy_scaling = self.rope_scaling.model_dump()
            if self.rope_scaling.rope_type == "linear":
                legacy_scaling = {"rope_type": "linear", "factor": self.rope_scaling.factor}
            parameters |= legacy_scaling
        eos = list(self.eos_token_ids)
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            **self.model_dump(exclude={"eos_token_ids", "rope_scaling"}),
            "eos_token_id": None if not eos else eos[0] if len(eos) == 1 else eos,
            "rope_scaling": legacy_scaling,    # transformers 4, llama.cpp
            "rope_parameters": parameters,     # transformers 5
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "dtype": dtype,
            "torch_dtype": dtype,
        }


def _as_integer(value: Any) -> Any:
    """Return what pydantic will make of a number written as text or as 32.0; anything else as it is."""
    try:
        return int(value) if isinstance(value, str) or (isinstance(value, float) and value.is_integer()) else value
    except ValueError:
        return value


def _read_rope(values: dict[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """Return theta and scaling from either generation of `config.json` (`rope_parameters` came with v5)."""
    for key in ("rope_parameters", "rope_scaling"):
        if not isinstance(values.get(key) or {}, dict):
            raise ConfigError(f"{key} is {values[key]!r}; it must be an object")
    parameters = dict(values.get("rope_parameters") or {})
    scaling = dict(values.get("rope_scaling") or {}) or dict(parameters)
    given = [table["rope_theta"] for table in (values, parameters, scaling) if table.get("rope_theta") is not None]
    theta = given[0] if given else 10_000.0
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind not in ("linear", "llama3"):
        raise ConfigError(f"rope scaling {kind!r} is not supported; Outrider computes default, linear and llama3")
    if kind == "llama3":
        scaling.setdefault("original_max_position_embeddings", values.get("max_position_embeddings", 2048))
        if missing := {"low_freq_factor", "high_freq_factor"} - scaling.keys():
            raise ConfigError(f"rope scaling llama3 lacks {', '.join(sorted(missing))}")
    known = RopeScaling.model_fields.keys() - {"rope_type"}
    return theta, {"rope_type": kind, **{key: scaling[key] for key in known if key in scaling}}


def validated(kind: type[T], values: Any, where: str) -> T:
    """Build `kind` from `values`, turning pydantic's report into one line that starts with `where`.

    Raises:
        ConfigError: naming the first offending key, its value and the rule it breaks.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{where}: {describe_validation_error(error)}") from error


def describe_validation_error(error: ValidationError) -> str:
    """Return the first problem of a pydantic error as one line, and how many more there are."""
    problems = error.errors()
    first = problems[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        text = f"unknown key '{key}'"
    else:
        reason = first["msg"].removeprefix("Value error, ")
        text = f"{key}: {reason}" if key else reason
        if key and first["type"] != "missing" and not isinstance(first["input"], dict):
            text += f" (got {first['input']!r})"
    return text if len(problems) == 1 else f"{text} (and {len(problems) - 1} more)"
