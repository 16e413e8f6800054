"""The launch configurations, read by accelerate's own launcher, without starting anything."""

from __future__ import annotations

from typing import Any

import pytest
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.launch import (
    prepare_deepspeed_cmd_env,
    prepare_multi_gpu_env,
    prepare_simple_launcher_cmd_env,
)

from .recipe_harness import CONFIGS

# File -> type, number of processes, and what the processes find in their environment.
EXPECTED: dict[str, tuple[str, int, dict[str, str]]] = {
    "single": ("NO", 1, {"ACCELERATE_USE_CPU": "False", "CUDA_VISIBLE_DEVICES": "0"}),
    "ddp": ("MULTI_GPU", 2, {}),
    "cpu_ddp": ("MULTI_GPU", 2, {"CUDA_VISIBLE_DEVICES": "-1,-1"}),
    "fsdp2": (
        "FSDP",
        2,
        {
            "ACCELERATE_USE_FSDP": "true",
            "FSDP_VERSION": "2",
            "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
            "FSDP_TRANSFORMER_CLS_TO_WRAP": "BertLayer",
            "FSDP_RESHARD_AFTER_FORWARD": "true",
            "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
            "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
            "FSDP_OFFLOAD_PARAMS": "false",
            "FSDP_ACTIVATION_CHECKPOINTING": "false",
        },
    ),
    "zero2": (
        "DEEPSPEED",
        2,
        {
            "ACCELERATE_USE_DEEPSPEED": "true",
            "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2",
            "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "none",
        },
    ),
    "zero3": (
        "DEEPSPEED",
        2,
        {
            "ACCELERATE_USE_DEEPSPEED": "true",
            "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
            "ACCELERATE_DEEPSPEED_ZERO3_INIT": "true",
            "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true",
        },
    ),
}
SECTIONS = ("fsdp_config", "deepspeed_config")


def launched(name: str) -> tuple[Any, dict[str, str]]:
    """The launcher's arguments after it has read the file, and the environment of the processes."""
    words = ["--config_file", str(CONFIGS / f"{name}.yaml"), "recipe.py", "--seed", "1"]
    args, defaults, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    assert (args.training_script, args.training_script_args) == ("recipe.py", ["--seed", "1"])
    if args.use_deepspeed:
        args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        return args, prepare_deepspeed_cmd_env(args)[1]
    if args.multi_gpu or args.use_fsdp:
        return args, prepare_multi_gpu_env(args)
    return args, prepare_simple_launcher_cmd_env(args)[1]


def test_every_file_is_expected_here() -> None:
    assert {path.stem for path in CONFIGS.iterdir()} == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_the_launcher_starts_what_the_file_says(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(variable, raising=False)
    kind, processes, environment = EXPECTED[name]
    config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
    assert isinstance(config, ClusterConfig)
    assert (config.distributed_type.value, config.num_processes, config.num_machines) == (kind, processes, 1)
    args, found = launched(name)
    # torchrun is told the number of processes; the launcher of a single one is no torchrun.
    assert getattr(args, "nproc_per_node", None) == (str(processes) if processes > 1 else None)
    assert (args.multi_gpu, args.use_fsdp, args.use_deepspeed) == (kind == "MULTI_GPU", kind == "FSDP", kind[0] == "D")
    expected = {"ACCELERATE_MIXED_PRECISION": "no", **environment}
    assert {key: found.get(key) for key in expected} == expected
    families = {"ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"} - set(expected)
    assert not families & set(found), "a launch of one kind only"


@pytest.mark.parametrize("name", [name for name in EXPECTED if name != "single"])
def test_a_port_is_found(name: str) -> None:
    first, second = (int(launched(name)[0].master_port) for _ in range(2))
    assert min(first, second) > 1023 and 29500 not in (first, second)


@pytest.mark.parametrize("name", EXPECTED)
def test_no_key_is_unknown(name: str) -> None:
    # Unknown keys at the top are refused by accelerate, those of a section are passed over.
    known = vars(launch_command_parser().parse_args(["recipe.py"]))
    config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
    used = {key for section in SECTIONS for key in getattr(config, section)}
    assert used <= set(known)
    assert bool(used) == (name in ("fsdp2", "zero2", "zero3"))


@pytest.mark.parametrize("name", EXPECTED)
def test_the_file_begins_with_its_launch_command(name: str) -> None:
    head = (CONFIGS / f"{name}.yaml").read_text().split("compute_environment")[0]
    assert all(line.startswith("#") for line in head.splitlines())
    relative = f"recipes/configs/accelerate/{name}.yaml"
    assert f"#   accelerate launch --config_file {relative} recipes/medical_textcls.py\n" in head
    assert "Change " in head
    assert (CONFIGS.parents[2] / relative).is_file() and (CONFIGS.parents[1] / "medical_textcls.py").is_file()


@pytest.mark.parametrize("processor_cores", [2, 8])
def test_processes_on_the_cpu_share_the_cores(processor_cores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("psutil.cpu_count", lambda logical=True: processor_cores)
    assert launched("cpu_ddp")[1]["OMP_NUM_THREADS"] == str(processor_cores // 2)


def test_fsdp_is_version_2_and_saves_whole_models(monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in launched("fsdp2")[1].items():
        if key.startswith("FSDP"):
            monkeypatch.setenv(key, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
    assert plugin.state_dict_type.name == "FULL_STATE_DICT"
    assert plugin.transformer_cls_names_to_wrap == ["BertLayer"] and not plugin.cpu_ram_efficient_loading


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_gets_its_stage_and_leaves_the_rest_to_the_recipe(
    stage: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("deepspeed", reason="ZeRO needs pip install 'hf-l2sp[deepspeed]'")
    from accelerate.utils import DeepSpeedPlugin

    for key, value in launched(f"zero{stage}")[1].items():
        if "DEEPSPEED" in key:
            monkeypatch.setenv(key, value)
    config = DeepSpeedPlugin().deepspeed_config
    zero = config["zero_optimization"]
    assert zero["stage"] == stage
    assert zero["stage3_gather_16bit_weights_on_model_save"] is (stage == 3)
    assert zero["offload_optimizer"]["device"] == zero["offload_param"]["device"] == "none"
    for name in ("train_batch_size", "gradient_accumulation_steps", "gradient_clipping"):
        assert config[name] == "auto"
