"""The files in launch/ parse, and start commands that exist with flags that exist."""

import functools
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from configs import dsmoe_16b
from dsmoe_jax.config import from_config_dict, replace
from dsmoe_jax.planning import planner
from tests.tools.forked import run_all

REPOSITORY = Path(__file__).parents[2]
FILES = sorted((REPOSITORY / "launch").iterdir())
THEIR_OWN = {  # flags of gcloud, sbatch, srun and xpk
    "zone", "worker", "command", "nodes", "job-name", "ntasks-per-node", "gpus-per-node", "signal",
    "requeue", "kill-on-bad-exit", "cluster", "workload", "tpu-type", "docker-image", "array",
    "ntasks", "gpus-per-task",
}  # fmt: skip


@functools.cache
def known_flags(module: str, *word: str) -> set[str]:
    """Those of a module, or of a command of it, by its manual."""
    (manual,) = run_all([[*word, "--help"]], module=module)
    assert manual.code == 0, manual.err
    return set(re.findall(r"^ +--(?:\[no\])?(\w+)", manual.out, re.MULTILINE))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_modules_flags_and_configs_exist(path):
    text = path.read_text()
    experiments = re.findall(r"experiments\.[\w.]+", text)
    if experiments:
        (module,) = map(str.split, set(experiments))
    else:
        assert set(re.findall(r"-m,? dsmoe_jax,? (\w+)", text)) == {"train"}
        module = ["dsmoe_jax", "train"]
    used = set(re.findall(r"--([a-z][\w-]*)", text)) - THEIR_OWN
    assert used
    for flag in used:
        assert flag in known_flags(*module), flag
    for config in re.findall(r"configs/\w+\.py", text):
        assert (REPOSITORY / config).is_file()
    assert f"launch/{path.name}" in (REPOSITORY / "docs/pods.md").read_text()


@pytest.mark.parametrize("path", [p for p in FILES if p.suffix == ".sh"], ids=lambda p: p.name)
def test_scripts_parse(path):
    subprocess.run(["bash", "-n", str(path)], check=True)


def test_job_set_asks_for_the_chips_of_its_slice_and_fits_them():
    (path,) = [path for path in FILES if path.suffix == ".yaml"]
    jobs = yaml.safe_load(path.read_text())["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = jobs["template"]["spec"]
    x, y, z = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    (container,) = pod["containers"]
    chips = container["resources"]["limits"]["google.com/tpu"]
    assert jobs["parallelism"] == jobs["completions"] == x * y * z // chips
    assert container["command"][:4] == ["python", "-m", "dsmoe_jax", "train"]
    given = dict(re.findall(r"--config\.([\w.]+)=(\d+)", " ".join(container["command"])))
    changes = {key: int(value) for key, value in given.items()}
    config = replace(from_config_dict(dsmoe_16b.get_config()), **changes)
    assert "--config=configs/dsmoe_16b.py" in container["command"]
    assert "tpu-v5p-slice" in pod["nodeSelector"].values()
    assert planner.examine(config, "v5p", x * y * z).sizes["expert"] == 8
    (mount,), (volume,) = container["volumeMounts"], pod["volumes"]
    assert mount["name"] == volume["name"]
