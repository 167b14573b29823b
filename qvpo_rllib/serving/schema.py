"""What a request may say and what a reply says; unknown keys, NaN and infinity are refused."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError

# They bound memory and the time that one client can make others wait.
MAX_BODY_BYTES = 4 * 2**20
READ_TIMEOUT_S = 5.0  # for a request's head, and for its body
MAX_ROWS = 256  # observations of a request
MAX_K = 256
MAX_SAMPLES = 8_192  # observations × k of a request: about a second at the paper's network sizes

Number = Annotated[float, Field(allow_inf_nan=False)]
Row = Annotated[list[Number], Field(min_length=1)]
Named = Annotated[dict[str, Any], Field(min_length=1)]


def _kind_of(row: Any) -> str:
    return NAMED if isinstance(row, dict) else FLAT


# A row's kind is decided first, so that a refusal speaks of that kind alone.
FLAT, NAMED = "vector", "parts"
Observation = Annotated[
    Annotated[Row, Tag(FLAT)] | Annotated[Named, Tag(NAMED)], Discriminator(_kind_of)
]


class ActRequest(BaseModel):
    """The body of `POST /v1/models/{name}/act`."""

    model_config = ConfigDict(extra="forbid", strict=True)

    observations: Annotated[list[Observation], Field(min_length=1, max_length=MAX_ROWS)] = Field(
        description="One observation per row: a vector as long as the model's obs_dim or, for a "
        "model with obs_parts, an object with the parts by name."
    )
    k: Annotated[int, Field(ge=1, le=MAX_K)] | None = Field(
        default=None,
        description="Actions drawn per observation, the best is taken; the model's k_eval if "
        "left out.",
    )
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = Field(
        default=None,
        description="Of the diffusion noise: the same request with the same seed gets the same "
        "actions. Fresh noise if left out.",
    )


class TimeMs(BaseModel):
    """Where a request's time went, in milliseconds."""

    queued: float
    computing: float  # of the batch that the request was part of


class ActReply(BaseModel):
    """The best of k actions for each observation, in the environment's box."""

    model: str
    version: str
    k: int
    seed: int | None
    actions: list[list[float]]
    time_ms: TimeMs


class ModelInfo(BaseModel):
    """One version of a model."""

    name: str
    version: str
    default: bool  # answers to the name alone
    env: str
    env_config: dict[str, Any]
    frame_skip: int
    wrappers: list[str]
    obs_dim: int
    obs_parts: list[dict[str, Any]] | None  # of a Dict or Tuple observation, in order
    act_low: list[float]
    act_high: list[float]
    k_eval: int
    k_max: int
    rows_max: int
    source: dict[str, Any]
    problem: str | None  # why a newer bundle at the same place could not be taken


class ModelList(BaseModel):
    models: list[ModelInfo]


class ErrorReply(BaseModel):
    error: str  # one sentence


def sentence_of(error: ValidationError) -> str:
    """Returns the first of pydantic's complaints as a sentence."""
    first = error.errors(include_url=False, include_input=False)[0]
    place = ""
    for part in first["loc"]:
        if part in ("function-after", FLAT, NAMED):
            continue
        place += f"[{part}]" if isinstance(part, int) else str(part)[:60]
    message = first["msg"].removesuffix(".")
    more = error.error_count() - 1
    return f"{place or 'The body'}: {message}" + (f" (and {more} more)." if more else ".")
