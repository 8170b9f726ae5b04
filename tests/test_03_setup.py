"""Chapter 3: device and processes."""

import itertools
import os
import subprocess
import sys

import pytest

from edu.training.accelerator import (
    autodetect_device_type,
    check_world_size,
    choose_precision,
    compute_init,
    environment,
    peak_flops,
)

SCRIPT = "scripts/check_setup.py"


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"} | environment
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, env=env, timeout=120, check=False)


def test_a_cpu_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert autodetect_device_type() == "cpu"


def test_two_processes_find_each_other() -> None:
    port = str(20000 + os.getpid() % 20000)
    done = run("-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}", SCRIPT)
    assert done.returncode == 0, done.stderr
    assert "rank=0  world_size=2" in done.stdout
    assert "rank=1  world_size=2" in done.stdout
    assert "2 process(es) answered" in done.stdout


def test_processes_that_do_not_see_each_other_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="WORLD_SIZE=2, but this process sees 1"):
        check_world_size(1)


def test_an_unknown_precision_is_named() -> None:
    with pytest.raises(ValueError, match="--mixed-precision 'fp8'"):
        compute_init(mixed_precision="fp8")


def test_fp16_on_a_cpu_is_refused_since_it_would_be_fp32() -> None:
    with pytest.raises(ValueError, match="--mixed-precision 'fp16': fp16 needs a GPU"):
        choose_precision("fp16", "cpu")
    assert choose_precision("fp16", "cuda") == choose_precision("fp16", "mps") == "fp16"


def test_the_launchers_settings_of_torch_compile_are_one_line() -> None:
    settings = "tests/dynamo.yaml"
    done = run("-m", "accelerate.commands.launch", "--config_file", settings, SCRIPT)
    assert done.returncode != 0
    assert "DYNAMO_BACKEND=EAGER" in done.stderr
    assert "Traceback" not in done.stderr.split("ACCELERATE_DYNAMO")[0]


def test_the_environment_names_processes_precision_machine_and_versions() -> None:
    found = environment(compute_init())
    assert (found["world_size"], found["mixed_precision"], found["device"].split(":")[0]) == (1, "no", "cpu")
    assert found["CPU"]
    assert found["cores"] >= 1
    assert found["memory"].endswith("GiB")
    assert found["torch"][0].isdigit()


def test_the_module_needs_nothing_that_windows_lacks() -> None:
    code = (
        "import psutil, sys; sys.modules['resource'] = sys.modules['fcntl'] = None; "  # psutil itself knows its system
        "import edu.training.accelerator, edu.training.step, edu.training.optimizer, edu.config.scaling"
    )
    done = run("-c", code)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("asked", "answer"),
    [
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, "shards the model over processes, and there is one"),
        ({"ACCELERATE_USE_FSDP": "true"}, "FSDP 1 flattens the weights.*: say fsdp_version: 2"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params: f"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "ZeRO flattens the weights, and Muon needs matrices"),
        ({"ACCELERATE_DYNAMO_BACKEND": "EAGER"}, "DYNAMO_BACKEND=EAGER .*launcher.*: give the script --compile"),
        ({"ACCELERATE_DYNAMO_BACKEND": "inductor"}, "DYNAMO_BACKEND=inductor .*launcher.*: give the script --compile"),
        ({"ACCELERATE_MIXED_PRECISION": "fp8"}, "MIXED_PRECISION=fp8 .*launcher.*: choose one of auto, no, bf16, fp16"),
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, "MIXED_PRECISION=fp16 .*launcher.*fp16 needs a GPU"),
    ],
)
def test_what_a_launcher_asks_and_cannot_be_is_refused_by_name(
    asked: dict[str, str], answer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"FSDP_CPU_RAM_EFFICIENT_LOADING": "", "ACCELERATE_USE_CPU": "true", **asked}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=answer):
        compute_init()


def test_the_speed_of_an_unknown_device_is_that_of_a_matrix_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.perf_counter", itertools.chain([0.0, 3.0], itertools.count(0.0, 0.5)).__next__)
    assert peak_flops.__wrapped__("cpu") == 2 * 1024**3 / 0.5  # the best of five
