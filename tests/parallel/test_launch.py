"""The files in launch/ parse, and start commands that exist with flags that exist."""

import functools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from configs import dsmoe_16b
from dsmoe_jax.config import from_config_dict, replace
from dsmoe_jax.planning import planner
from tests.tools.forked import run_all

REPOSITORY = Path(__file__).parents[2]
FILES = sorted((REPOSITORY / "launch").iterdir())
JOB_SETS = [path for path in FILES if path.suffix == ".yaml"]
THEIR_OWN = {  # flags of gcloud, sbatch, srun and xpk
    "zone", "worker", "command", "nodes", "job-name", "ntasks-per-node", "gpus-per-node", "signal",
    "requeue", "kill-on-bad-exit", "cluster", "workload", "tpu-type", "docker-image", "array",
    "ntasks", "gpus-per-task", "num-slices", "node", "node-count", "node-prefix",
    "accelerator-type", "runtime-version",
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
    used = set(re.findall(r"--([a-z][\w-]*)", re.sub(r"`plan [^`]*`", "", text))) - THEIR_OWN
    assert used
    for flag in used:
        assert flag in known_flags(*module), flag
    for config in re.findall(r"configs/\w+\.py", text):
        assert (REPOSITORY / config).is_file()
    assert f"launch/{path.name}" in (REPOSITORY / "docs/pods.md").read_text()


@pytest.mark.parametrize("path", [p for p in FILES if p.suffix == ".sh"], ids=lambda p: p.name)
def test_scripts_parse(path):
    subprocess.run(["bash", "-n", str(path)], check=True)


def test_scripts_have_no_findings():
    """`shellcheck`, of the extra `test`."""
    shellcheck = shutil.which("shellcheck", path=Path(sys.executable).parent)
    if shellcheck is None:
        pytest.skip("shellcheck is not installed: pip install 'dsmoe_jax[test]'")
    done = subprocess.run(
        [shellcheck, *(p for p in FILES if p.suffix == ".sh")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", JOB_SETS, ids=lambda path: path.name)
def test_job_set_is_one(path):
    """The fields that JobSet, Job and Pod require, and values that they can have."""
    job_set = yaml.safe_load(path.read_text())
    assert job_set["apiVersion"] == "jobset.x-k8s.io/v1alpha2"
    assert job_set["kind"] == "JobSet"
    spec = job_set["spec"]
    assert isinstance(spec["failurePolicy"]["maxRestarts"], int)
    for rule in spec["failurePolicy"].get("rules", []):
        assert rule["action"] in (
            "FailJobSet",
            "RestartJobSet",
            "RestartJobSetAndIgnoreMaxRestarts",
        )
        assert set(rule["onJobFailureReasons"]) <= {"PodFailurePolicy", "BackoffLimitExceeded"}
    (jobs,) = spec["replicatedJobs"]
    pod = jobs["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    for name in (job_set["metadata"]["name"], jobs["name"], container["name"]):
        assert re.fullmatch(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?", name), "a DNS label"
    assert jobs["template"]["spec"]["backoffLimit"] == 0, "all start again together"
    assert pod["restartPolicy"] == "Never", "which a podFailurePolicy needs"
    for rule in jobs["template"]["spec"].get("podFailurePolicy", {}).get("rules", []):
        assert rule["action"] in ("FailJob", "Ignore", "Count", "FailIndex")
        assert rule["onExitCodes"]["containerName"] == container["name"]
        assert rule["onExitCodes"]["operator"] in ("In", "NotIn")
        assert rule["onExitCodes"]["values"] == [2], "bad input alone is not tried again"
    volumes = {volume["name"] for volume in pod.get("volumes", [])}
    assert {mount["name"] for mount in container.get("volumeMounts", [])} == volumes


@pytest.mark.parametrize("path", JOB_SETS, ids=lambda path: path.name)
def test_job_set_asks_for_the_chips_of_its_slices_and_fits_them(path):
    jobs = yaml.safe_load(path.read_text())["spec"]["replicatedJobs"][0]
    job, slices = jobs["template"]["spec"], jobs.get("replicas", 1)
    pod = job["template"]["spec"]
    x, y, z = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    (container,) = pod["containers"]
    chips = container["resources"]["limits"]["google.com/tpu"]
    assert job["parallelism"] == job["completions"] == x * y * z // chips
    assert container["command"][:4] == ["python", "-m", "dsmoe_jax", "train"]
    (parsed,) = run_all([container["command"][3:]], only_parse=True)
    assert parsed.code == 0, parsed.err
    given = dict(re.findall(r"--config\.([\w.]+)=(\d+)", " ".join(container["command"])))
    changes = {key: int(value) for key, value in given.items()}
    assert changes.get("mesh.slices", 1) == slices
    config = replace(from_config_dict(dsmoe_16b.get_config()), **changes)
    assert "--config=configs/dsmoe_16b.py" in container["command"]
    assert "tpu-v5p-slice" in pod["nodeSelector"].values()
    plan = planner.examine(config, "v5p", x * y * z * slices)
    assert plan.sizes["expert"] == 8
    assert plan.slices == slices


def test_the_flags_of_the_planner_parse():
    config = replace(from_config_dict(dsmoe_16b.get_config()), **{"mesh.slices": 2})
    plan, _ = planner.propose(config, "v5p", 128)
    train = ["train", "--config=configs/dsmoe_16b.py", "--workdir=x", *planner.flags(plan)]
    (parsed,) = run_all([train], only_parse=True)
    assert parsed.code == 0, parsed.err


@pytest.mark.parametrize(
    ("codes", "runs", "code"),
    [([0], 1, 0), ([75, 134, 0], 3, 0), ([2], 1, 2), ([1, 143], 2, 143), ([1, 1, 1, 1, 0], 4, 1)],
)
def test_the_restart_loop(tmp_path, codes, runs, code):
    """A command that ends with one code after the other, at most three restarts."""
    (tmp_path / "codes").write_text("".join(f"{c}\n" for c in codes))
    command = tmp_path / "command.sh"
    command.write_text(
        f'cd {tmp_path} && echo "$1" >> ran && exit "$(sed -n "$(wc -l < ran)p" codes)"\n'
    )
    done = subprocess.run(
        ["bash", str(REPOSITORY / "launch/restart.sh"), "bash", str(command), "--a b"],
        env={**os.environ, "RESTARTS": "3", "RESTART_SECONDS": "0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == code, done.stderr
    assert (tmp_path / "ran").read_text() == "--a b\n" * runs
    assert ("gave up" in done.stderr) == (code == 1)
