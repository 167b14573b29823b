"""What every setting of RLlib's `AlgorithmConfig` means here: one table for all algorithms.

A setting is honoured, or refused where it has another value than the algorithm's own, or RLlib's
own bookkeeping. None is ignored in silence: what is in no list is refused too.
"""

import reprlib
from fnmatch import fnmatchcase
from typing import Any

from qvpo_rllib.core.options import nearest, options_of


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


HONOURED = _names("""
    placement_strategy num_gpus num_cpus_for_main_process custom_resources_for_main_process
    num_env_runners num_cpus_per_env_runner num_gpus_per_env_runner custom_resources_per_env_runner
    extra_python_environs_for_driver extra_python_environs_for_worker
    env env_config num_envs_per_env_runner rollout_fragment_length sample_timeout_s
    validate_env_runners_after_construction callbacks_class
    evaluation_interval evaluation_duration evaluation_num_env_runners evaluation_config
    evaluation_parallel_to_training evaluation_sample_timeout_s
    evaluation_unhealthy_workers_timeout_s evaluation_error_after_n_consecutive_skips
    min_time_s_per_iteration min_train_timesteps_per_iteration min_sample_timesteps_per_iteration
    metrics_num_episodes_for_smoothing keep_per_episode_custom_metrics
    seed log_level log_sys_usage replay_in_checkpoints
    restart_failed_env_runners max_num_env_runner_restarts delay_between_env_runner_restarts_s
    num_consecutive_env_runner_failures_tolerance restart_failed_sub_environments
    env_runner_health_probe_timeout_s env_runner_restore_timeout_s
""")
# What `evaluation_config` may set for the evaluation's own workers.
IN_EVALUATION = _names("""
    env env_config num_envs_per_env_runner explore k_eval callbacks_class log_level
    num_cpus_per_env_runner num_gpus_per_env_runner custom_resources_per_env_runner
    extra_python_environs_for_worker validate_env_runners_after_construction
    restart_failed_env_runners max_num_env_runner_restarts delay_between_env_runner_restarts_s
    restart_failed_sub_environments env_runner_health_probe_timeout_s
    keep_per_episode_custom_metrics
""")
# What RLlib, or this package, changes by itself.
BOOKKEEPING = {
    "algo_class": "follows from the configuration's class",
    "class": "RLlib notes it in a copy",
    "derived_values": "what `validate` made of the options the last time",
    "in_evaluation": "marks the copy that evaluation workers get",
    "policies": "RLlib writes the specification of the one policy in several forms",
    "simple_optimizer": "RLlib sets it in `validate`",
    "worker_index": "RLlib notes it in a worker's copy",
    "_is_atari": "RLlib would note here what it has found out",
    "_is_frozen": "RLlib's lock on a configuration in use",
    "_is_online": "RLlib notes here what it has found out",
    "_per_module_overrides": "RLlib's cache",
    "_prior_exploration_config": "RLlib keeps here what a switch of its API stack replaces",
}
# By reason: settings, or patterns of them, that must keep their value. The first that fits holds.
REFUSED = {
    "{label} has no such option": """
        lr lr_schedule gamma grad_clip grad_clip_by train_batch_size _train_batch_size_per_learner
        num_epochs minibatch_size shuffle_batch_per_epoch model optimizer
        use_critic use_gae use_kl_loss kl_* vf_* entropy_coeff_schedule
        twin_q q_model_config policy_model_config initial_alpha target_* n_step
        store_buffer_in_checkpoints training_intensity optimization replay_buffer_config
        num_steps_sampled_before_learning_starts replay_sequence_length _deterministic_loss
        _use_beta_distribution""",
    "{label} trains online; `qvpo replay export` writes the transitions that it has seen": """
        input_* output* prelearner_* *offline* dataset_* materialize_* map_batches_* iter_batches_*
        ignore_final_observation actions_in_input_normalized postprocess_inputs shuffle_buffer_size
        off_policy_estimation_methods ope_*""",
    "networks and updates are written in PyTorch, and `engine` says what is compiled": """
        framework_str eager_* *tf_session_args torch_* *tf1_* _tf_* _torch_*""",
    "{label} runs on RLlib's old API stack, where `TorchPolicy` lives": """
        enable_* *connector* *env_runner_state* _rl_module_spec _model_config
        algorithm_config_overrides_per_module episodes_to_numpy episode_lookback_horizon
        gym_env_vectorize_mode action_mask_key stats_cls_lookup log_gradients
        create_local_env_runner _use_msgpack_checkpoints""",
    "the learner runs in the algorithm's own process; for a GPU set resources(num_gpus=1)": """
        *learner* *aggregator* local_gpu_idx _fake_gpus""",
    "training explores as {label}'s options say, and evaluation does not": """
        explore exploration_config""",
    "the policy's actions are in [-1, 1], and are scaled to the environment's box": """
        normalize_actions clip_actions _disable_action_flattening""",
    "scale or clip rewards in an environment wrapper": "clip_rewards",
    "normalize_observations=true does that, with statistics that are part of the policy": """
        observation_filter *_worker_filter_stats sync_filters_on_rollout_workers_timeout_s""",
    "observations are taken as the environment gives them; change them in a wrapper": """
        observation_space action_space preprocessor_pref compress_observations observation_fn
        _disable_preprocessor_api""",
    "raise num_envs_per_env_runner or num_env_runners": "remote_worker_envs remote_env_*",
    "`qvpo record` makes videos": "render_env",
    "a fragment is rollout_fragment_length env steps": "batch_mode",
    "a worker's episodes come with its fragments": "metrics_episode_collection_timeout_s",
    "a lost worker ends no run while others are left": "ignore_env_runner_failures",
    "`sampling_mode` and `max_staleness` say how far workers may run ahead": """
        max_requests_in_flight_per_env_runner""",
    "the workers are of {label}'s own class": """
        env_runner_cls sample_collector sampler_perf_stats_ema_coef create_env_on_local_worker""",
    "{label} trains one policy, and counts env steps": "policy_* policies_to_train count_steps_by",
    "evaluation plays whole episodes with a quota for each environment, so that short ones are not "
    "favoured; give a number of episodes": """
        evaluation_duration_unit evaluation_auto_* evaluation_force_reset_envs_before_iteration
        custom_evaluation_function""",
    "give the function to `config.callbacks(…)`": "callbacks_on_*",
    "`qvpo export` writes the policy": """
        export_native_model_files checkpoint_trainable_policies_only""",
    "environments and configurations are always checked": """
        disable_env_checking _validate_config _disable_initialize_loss_from_dummy_batch""",
    "it is for RLlib's own tests": "fake_sampler",
}
GIVEN_UP = -1  # the value of settings that RLlib has given up
# Names of RLlib's `training()` and the options that replace them, where an algorithm has none of
# that name itself.
REPLACED_OPTIONS: dict[str, tuple[str, ...]] = {
    "lr": ("actor_lr", "critic_lr"),
    "lr_schedule": ("lr_end", "lr_decay_steps", "actor_lr", "critic_lr"),
    "train_batch_size": ("batch_size",),
    "train_batch_size_per_learner": ("batch_size", "train_batch_size"),
    "minibatch_size": ("batch_size",),
    "sgd_minibatch_size": ("minibatch_size", "batch_size"),
    "num_epochs": ("update_ratio",),
    "num_sgd_iter": ("num_epochs", "update_ratio"),
    "model": ("hidden",),
    "q_model_config": ("hidden",),
    "policy_model_config": ("hidden",),
    "optimizer": ("actor_lr", "critic_lr", "adam_eps", "lr"),
    "optimization": ("actor_lr", "critic_lr", "alpha_lr", "lr"),
    "replay_buffer_config": ("replay_capacity", "train_batch_size"),
    "training_intensity": ("update_ratio", "num_epochs"),
    "num_steps_sampled_before_learning_starts": ("warmup_steps",),
    "target_network_update_freq": ("tau",),
    "initial_alpha": ("alpha", "entropy_weight"),
    "entropy_coeff": ("entropy_weight", "alpha"),
    "entropy_coeff_schedule": ("entropy_weight_end",),
    "target_entropy": ("auto_alpha",),
    "exploration_config": ("k_behavior", "exploration_noise", "warmup_steps", "entropy_coeff"),
    "store_buffer_in_checkpoints": ("replay_in_checkpoints",),
}


def replacing(config: Any, name: str) -> list[str]:
    """Returns the options to use instead of `name`; [] if it is an option, or there are none."""
    options = options_of(config.hyperparameters_class)
    names = () if name in options else REPLACED_OPTIONS.get(name.removeprefix("_"), ())
    return [option for option in names if option in (*options, "replay_in_checkpoints")]


def refusal(config: Any, name: str, value: object) -> ValueError:
    """Returns the error for a setting that must keep its own value: why, and what to use."""
    label = config.algorithm_name
    if instead := replacing(config, name):
        *rest, last = instead
        text = f"{', '.join(rest)} and {last}" if rest else last
        return ValueError(f"{label} does not read {name!r}: use {text} instead.")
    own = own_values(config).get(name)
    reason = reason_to_refuse(name, own) or "nothing here reads it"
    return ValueError(
        f"{name}={reprlib.repr(value)} is not supported: {label} allows {own!r} alone; "
        f"{reason.format(label=label)}."
    )


def check_settings(config: Any) -> None:
    """Raises `ValueError` for the first setting whose value nothing would read."""
    own, options = own_values(config), options_of(config.hyperparameters_class)
    read = HONOURED | BOOKKEEPING.keys() | options.keys() | config.honoured_too
    # A switch of the API stack changes other settings too.
    for name, value in sorted(vars(config).items(), key=lambda item: item[0][:7] != "enable_"):
        if name in read or (name in own and same(value, own[name])) or name.startswith("__"):
            continue  # Tune adds names with two underscores
        if name not in own:
            near = nearest(name, [*options, *own])
            raise ValueError(f"There is no setting {name!r}.{near}")
        if not (name in config.derived_values and same(value, config.derived_values[name])):
            raise refusal(config, name, value)


def check_evaluation_config(config: Any) -> None:
    """Raises `ValueError` for what `evaluation_config` sets and no evaluation reads."""
    for name, value in (config.evaluation_config or {}).items():
        if name == "explore" and value:
            raise refusal(config, name, value)
        if name not in IN_EVALUATION and not same(value, getattr(config, name, None)):
            raise ValueError(
                f"evaluation_config={{{name!r}: {reprlib.repr(value)}}} is not supported: no "
                f"evaluation reads it. Allowed are {', '.join(sorted(IN_EVALUATION))}."
            )


def own_values(config: Any) -> dict[str, Any]:
    """Returns every setting's value in a new configuration of the same class."""
    return dict(vars(type(config)()))


def same(one: object, other: object) -> bool:
    """Returns whether two values are equal; arrays of several numbers never are."""
    try:
        return one is other or bool(one == other)
    except (TypeError, ValueError):
        return False


def reason_to_refuse(name: str, own: object) -> str | None:
    """Returns why a setting must keep its `own` value; None if it is in no list."""
    if own == GIVEN_UP:
        return "RLlib has given it up"
    matching = (
        reason
        for reason, patterns in REFUSED.items()
        if any(fnmatchcase(name, pattern) for pattern in patterns.split())
    )
    return next(matching, None)
