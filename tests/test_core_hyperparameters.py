"""Hyperparameters: what is refused and how, what is read, and the presets."""

import dataclasses
import math
import re

import pytest

from qvpo_rllib.core import options
from qvpo_rllib.core.options.qvpo import QVPOHyperparameters

NAMES = tuple(options.options_of(QVPOHyperparameters))
CHOICES = {
    f.name: f.metadata["choices"]
    for f in dataclasses.fields(QVPOHyperparameters)
    if f.metadata["choices"]
}
PRESETS = QVPOHyperparameters.presets


def check_name(name):
    options.check_name(name, QVPOHyperparameters)


def parse_option(name, text):
    return options.parse_option(name, text, QVPOHyperparameters)


INTEGER = "an integer"
NUMBER = "a finite number"
POSITIVE_INTEGERS = (
    "k_behavior",
    "k_target",
    "k_eval",
    "num_policy_samples",
    "num_chosen_samples",
    "diffusion_steps",
    "batch_size",
    "replay_capacity",
    "entropy_decay_steps",
    "num_quantiles",
    "guidance_steps",
    "entropy_noises",
)
COUNTS = ("num_uniform_samples", "warmup_steps", "max_staleness", "dropped_quantiles")
POSITIVE_NUMBERS = (
    *("actor_lr", "critic_lr", "adam_eps", "update_ratio", "q_cut", "grad_clip"),
    "kl_target",
)
WEIGHTS = (
    "entropy_weight",
    "entropy_weight_end",
    "entropy_weight_floor",
    "guidance_scale",
    "entropy_in_target",
)
SHARES = ("tau", "sample_std_target")
FLAGS = ("vlo_coefficient", "target_actor", "truncation_as_terminal", "critic_layer_norm")
INTEGERS = POSITIVE_INTEGERS + COUNTS
NUMBERS = (*POSITIVE_NUMBERS, *WEIGHTS, *SHARES, "gamma", "target_entropy")
NOT_OPTIONAL = sorted(
    set(NAMES) - {"k_target", "grad_clip", "entropy_weight_end", "max_staleness", "target_entropy"}
)  # None is a value of these alone

BAD = [
    *[(name, value, "1 or more") for name in POSITIVE_INTEGERS for value in (0, -3)],
    *[(name, -1, "0 or more") for name in (*COUNTS, *WEIGHTS)],
    *[(name, value, "above 0") for name in POSITIVE_NUMBERS for value in (0, 0.0, -1e-9)],
    *[(name, value, INTEGER) for name in INTEGERS for value in (2.5, "4", True, math.nan, [4])],
    *[
        (name, value, NUMBER)
        for name in NUMBERS
        for value in (math.nan, math.inf, -math.inf, "1e-4", True, (1.0,))
    ],
    *[(name, value, "true or false") for name in FLAGS for value in (0, 1, "true", 1.0)],
    *[
        (name, value, ", ".join(CHOICES[name]))
        for name in CHOICES
        for value in ("best", "", "QADV")
    ],
    *[(name, 3, "a word") for name in CHOICES],
    *[(name, None, "must be") for name in NOT_OPTIONAL],
    *[("gamma", value, "[0, 1)") for value in (-0.01, 1, 1.0, 1.5)],
    *[(name, value, "(0, 1]") for name in SHARES for value in (0, -0.1, 1.01)],
    ("entropy_weight", "Auto", "a finite number or auto"),
    ("entropy_weight", -1, "0 or more, or auto"),
    *[("hidden", value, "[256, 256]") for value in ((), (0,), [256, -1])],
    *[("hidden", value, "integers") for value in (256, "256", (256.5,), ["256"], (True,))],
]


@pytest.mark.parametrize(("name", "value", "allowed"), BAD)
def test_a_bad_value_is_refused_by_name_with_what_is_allowed(name, value, allowed):
    with pytest.raises(ValueError, match=f"^{name}=") as error:
        QVPOHyperparameters(**{name: value})
    message = str(error.value)
    shown = [repr(v) for v in (value, *((tuple(value),) if isinstance(value, list) else ()))]
    if isinstance(value, int) and not isinstance(value, bool):
        shown.append(repr(float(value)))
    assert any(message.startswith(f"{name}={text} ") for text in shown), message
    assert allowed in message


def test_an_integer_beyond_every_float_is_refused_by_name():
    with pytest.raises(ValueError, match=r"^actor_lr="):
        QVPOHyperparameters(actor_lr=10**400)


def test_a_presets_schedule_is_refused_with_all_that_must_be_set():
    auto = {"entropy_weight": "auto"}
    with pytest.raises(ValueError, match=r"^entropy_weight_end=0\.0 .* must be none") as error:
        QVPOHyperparameters.resolve("authors", auto)
    assert "entropy_weight_end=none and entropy_weight_floor=0" in str(error.value)
    left = {"entropy_weight_end": None}
    with pytest.raises(ValueError, match=r"^entropy_weight_floor=0\.002 .* must be 0 with .*auto"):
        QVPOHyperparameters.resolve("authors", auto | left)
    QVPOHyperparameters.resolve("authors", auto | left | {"entropy_weight_floor": 0.0})


@pytest.mark.parametrize(
    ("values", "name", "other"),
    [
        ({"num_policy_samples": 4, "num_chosen_samples": 5}, "num_chosen_samples", "samples=4"),
        ({"q_weights": "softmax", "num_chosen_samples": 2}, "num_chosen_samples", "softmax"),
        ({"q_weights": "softmax", "kl_target": 4.2}, "kl_target", "num_policy_samples=64"),
        ({"q_weights": "softmax", "target_refinement": "gradient"}, "target_refinement", "softmax"),
        (
            {"target_refinement": "guidance", "num_policy_samples": 1},
            *("num_policy_samples", "'guidance'"),
        ),
        (
            {"target_entropy": -2.0, "entropy_in_target": 0.1},
            "target_entropy",
            "entropy_in_target='auto'",
        ),
        ({"entropy_weight": "auto", "entropy_weight_end": 0.1}, "entropy_weight_end", "'auto'"),
        ({"entropy_weight": "auto", "num_uniform_samples": 0}, "num_uniform_samples", "'auto'"),
        ({"entropy_weight": "auto", "num_policy_samples": 1}, "num_policy_samples", "'auto'"),
        ({"replay_capacity": 100, "warmup_steps": 0}, "replay_capacity", "batch_size=256"),
        ({"replay_capacity": 9_999}, "replay_capacity", "warmup_steps=10000"),
        ({"critic": "quantile", "dropped_quantiles": 25}, "dropped_quantiles", "num_quantiles=25"),
        (
            {"critic": "quantile", "num_quantiles": 2, "dropped_quantiles": 2},
            "dropped_quantiles",
            "num_quantiles=2",
        ),
        ({"num_quantiles": 10}, "num_quantiles", "25 .*critic is twin"),
        ({"dropped_quantiles": 0}, "dropped_quantiles", "2 .*critic is twin"),
    ],
)
def test_contradictions_are_refused_naming_both_sides(values, name, other):
    with pytest.raises(ValueError, match=f"^{name}={values[name]!r} .*{other}"):
        QVPOHyperparameters(**values)


@pytest.mark.parametrize(
    ("name", "value", "suggestion"),
    [("q_weights", "qavd", "qadv"), ("noise_schedule", "cosin", "cosine"),
     ("update_order", "policy_than_critic", "policy_then_critic")],
)  # fmt: skip
def test_a_misspelt_choice_gets_a_suggestion(name, value, suggestion):
    with pytest.raises(ValueError, match=f"Did you mean '{suggestion}'"):
        QVPOHyperparameters(**{name: value})


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [("k_behaviour", "k_behavior"), ("actor_learning_lr", "actor_lr"), ("gama", "gamma"),
     ("num_uniform_sample", "num_uniform_samples"), ("zzz", None)],
)  # fmt: skip
@pytest.mark.parametrize(
    "refuse",
    [check_name, lambda name: parse_option(name, "1")],
    ids=["check_name", "parse_option"],
)
def test_an_unknown_name_is_refused_with_the_nearest_and_all_names(refuse, name, suggestion):
    with pytest.raises(ValueError, match="no option") as error:
        refuse(name)
    message = str(error.value)
    assert repr(name) in message
    assert all(option in message for option in NAMES)
    found = re.search(r"Did you mean '(\w+)'", message)
    assert (found and found[1]) == suggestion


@pytest.mark.parametrize(
    "values",
    [
        {"k_target": None},
        {"grad_clip": None},
        {"entropy_weight_end": None},
        {"num_uniform_samples": 0, "entropy_weight": 0},
        {"entropy_weight": "auto"},
        {"entropy_in_target": "auto", "target_entropy": -3.0},
        {"gamma": 0, "tau": 1},
        {"num_policy_samples": 4, "num_chosen_samples": 4},
        {"replay_capacity": 10_000},
        {"hidden": (1,)},
        {"critic": "quantile", "num_quantiles": 1, "dropped_quantiles": 0},
        {"critic": "quantile", "num_quantiles": 3, "dropped_quantiles": 2},
        *[{name: value} for name, allowed in CHOICES.items() for value in allowed],
    ],
)
def test_the_ends_of_what_is_allowed_are_allowed(values):
    made = QVPOHyperparameters(**values)
    assert {name: getattr(made, name) for name in values} == values


def test_values_are_brought_to_their_types():
    made = QVPOHyperparameters(hidden=[64, 32], batch_size=128.0, gamma=0, grad_clip=1)
    assert made.hidden == (64, 32)
    assert (type(made.batch_size), type(made.gamma), type(made.grad_clip)) == (int, float, float)
    assert hash(made) == hash(QVPOHyperparameters(**made.to_dict()))


def test_immutable_and_checked_again_when_replaced():
    made = QVPOHyperparameters()
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.gamma = 0.5
    assert dataclasses.replace(made, gamma=0.5).gamma == 0.5
    with pytest.raises(ValueError, match="gamma"):
        dataclasses.replace(made, gamma=2.0)


def test_a_dictionary_goes_round():
    made = QVPOHyperparameters(k_target=3, hidden=(7,), grad_clip=None, q_weights="qcut")
    assert QVPOHyperparameters(**made.to_dict()) == made
    assert set(made.to_dict()) == set(NAMES)


def test_defaults_are_the_documented_ones():
    """The table of the reference, typed out again: a changed default must be changed twice."""
    assert QVPOHyperparameters().to_dict() == {
        "k_behavior": 4, "k_target": None, "k_eval": 32, "num_policy_samples": 64,
        "num_chosen_samples": 1, "num_uniform_samples": 10, "entropy_weight": 0.01,
        "entropy_weight_end": None, "entropy_weight_floor": 0.0,
        "entropy_decay_steps": 1_000_000, "entropy_reduction": "sum", "q_weights": "qadv",
        "q_cut": 0.01, "kl_target": 2.0, "target_refinement": "none",
        "gradient_steps": 20,
        "gradient_lr": 0.03,
        "guidance_scale": 0.1, "guidance_steps": 10, "entropy_in_target": 0.0, "entropy_noises": 10,
        "target_entropy": None, "sample_std_target": 0.2,
        "diffusion_steps": 20, "noise_schedule": "cosine",
        "vlo_coefficient": False, "hidden": (256, 256, 256), "actor_lr": 1e-4,
        "critic_lr": 3e-4, "adam_eps": 1e-5, "grad_clip": 2.0, "gamma": 0.99, "tau": 0.005,
        "target_actor": True, "update_order": "critic_then_policy", "batch_size": 256,
        "replay_capacity": 1_000_000, "warmup_steps": 10_000, "update_ratio": 1.0,
        "n_step": 1, "normalize_observations": False,
        "truncation_as_terminal": False, "engine": "auto", "sampling_precision": "fp32",
        "ranking_precision": "fp32",
        "sampling_mode": "async", "max_staleness": None, "policy_interval": 1,
        "critic": "twin", "num_quantiles": 25, "dropped_quantiles": 2, "critic_layer_norm": False,
        "frame_skip": 1, "wrappers": (),
    }  # fmt: skip


@pytest.mark.parametrize("option", dataclasses.fields(QVPOHyperparameters), ids=lambda f: f.name)
def test_every_option_has_a_meaning_and_its_default_can_be_typed(option):
    assert option.metadata["meaning"]
    value = option.default
    text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
    parsed = parse_option(option.name, text)
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("k_behavior", " 8 ", 8),
        ("replay_capacity", "1_000_000", 1_000_000),
        ("actor_lr", "1e-4", 1e-4),
        ("gamma", "1", 1.0),
        ("k_target", "none", None),
        ("k_target", "3", 3),
        ("grad_clip", "None", None),
        ("grad_clip", "null", None),
        ("grad_clip", "0.5", 0.5),
        ("target_actor", "false", False),
        ("vlo_coefficient", "True", True),
        ("q_weights", "qcut", "qcut"),
        ("entropy_weight", " Auto ", "auto"),
        ("entropy_weight", "0.5", 0.5),
        ("hidden", "256,128", (256, 128)),
        ("hidden", "[256, 128]", (256, 128)),
        ("hidden", "(64,)", (64,)),
        ("wrappers", "a:b, c.d:e", ("a:b", "c.d:e")),
        ("wrappers", "[]", ()),
    ],
)
def test_text_is_read_as_the_options_type(name, text, value):
    parsed = parse_option(name, text)
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize(
    ("name", "text", "allowed"),
    [
        ("k_behavior", "four", "an integer"),
        ("k_behavior", "2.5", "an integer"),
        ("k_behavior", "none", "an integer"),
        ("k_target", "", "an integer or none"),
        ("gamma", "0,99", "a finite number"),
        ("gamma", "none", "a finite number"),
        ("grad_clip", "off", "a finite number or none"),
        ("entropy_weight", "automatic", "a finite number or auto"),
        ("target_actor", "maybe", "true or false"),
        ("target_actor", "1", "true or false"),
        ("hidden", "256x256", "a list of integers"),
        ("hidden", "2.5,3", "a list of integers"),
    ],
)
def test_unreadable_text_is_refused_with_what_is_allowed(name, text, allowed):
    with pytest.raises(ValueError, match="is not valid") as error:
        parse_option(name, text)
    assert str(error.value) == f"{name}={text!r} is not valid: it must be {allowed}" + (
        ", such as [256, 256]." if name == "hidden" else "."
    )


# --- ω_ent over time -------------------------------------------------------------------------


def test_the_entropy_weight_is_constant_by_default():
    assert {QVPOHyperparameters().entropy_weight_at(n) for n in (0, 1, 10**6, 10**9)} == {0.01}


@pytest.mark.parametrize(
    ("env_steps", "weight"),
    [(0, 0.02), (100_000, 0.018), (500_000, 0.01), (850_000, 0.003), (900_000, 0.002),
     (950_000, 0.002), (1_000_000, 0.002), (5_000_000, 0.002)],
)  # fmt: skip
def test_the_authors_entropy_weight_falls_linearly_to_its_floor(env_steps, weight):
    authors = QVPOHyperparameters(**PRESETS["authors"])
    assert authors.entropy_weight_at(env_steps) == pytest.approx(weight, rel=1e-12)


@pytest.mark.parametrize(
    ("env_steps", "weight"), [(0, 0.0), (50, 0.25), (100, 0.5), (101, 0.5), (10_000, 0.5)]
)
def test_the_entropy_weight_may_rise_and_stops_at_its_end(env_steps, weight):
    made = QVPOHyperparameters(entropy_weight=0, entropy_weight_end=0.5, entropy_decay_steps=100)
    assert made.entropy_weight_at(env_steps) == pytest.approx(weight)


# --- Presets ---------------------------------------------------------------------------------

K_TARGET = {"Hopper": 1, "Walker2d": 2, "Ant": 2, "HalfCheetah": 4, "Humanoid": 2,
            "Swimmer": 2, "Pendulum": 2, "some/Hopper": 1}  # fmt: skip


@pytest.mark.parametrize("version", ["-v4", "-v5"])
@pytest.mark.parametrize("task", K_TARGET)
@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_builds_for_every_task(preset, task, version):
    made = QVPOHyperparameters(**PRESETS[preset])
    resolved = QVPOHyperparameters.resolve(preset, env=task + version)
    assert resolved.k_target == PRESETS[preset].get("k_target", K_TARGET[task])
    unchanged = set(NAMES) - {"k_target"}
    assert all(getattr(resolved, name) == getattr(made, name) for name in unchanged)


def test_a_given_k_target_is_kept():
    resolved = QVPOHyperparameters.resolve(given={"k_target": 7}, env="Hopper-v5")
    assert resolved == QVPOHyperparameters(k_target=7)


def test_the_paper_preset_follows_its_table_2():
    paper = QVPOHyperparameters(**PRESETS["paper"])
    assert (paper.actor_lr, paper.critic_lr, paper.hidden) == (3e-4, 3e-4, (256, 256))
    assert (paper.grad_clip, paper.entropy_reduction) == (None, "mean")
    assert paper.update_order == "policy_then_critic"
