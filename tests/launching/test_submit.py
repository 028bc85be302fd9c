"""Job files of Slurm, SkyPilot and Kubernetes: what they say, that their shell lines run, and bad input."""

import subprocess

import pytest
import yaml
from click.testing import CliRunner

from fitune.cli import cli
from fitune.config import run as runs

WANTED = {
    "slurm": [],
    "skypilot": ["--gpu", "H100", "--bucket", "s3://mine"],
    "kubernetes": ["--image", "example.org/fitune:1"],
}
SKY = ("--gpus", "8", "--bucket", "s3://mine")


@pytest.fixture
def submit(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def call(scheduler: str, *flags: str, code: int = 0):
        words = ["submit", "llama3_8b_qlora", "--on", scheduler, "--output", "runs/job", *flags]
        result = CliRunner().invoke(cli, words)
        assert result.exit_code == code, result.output
        return result

    return call


def script_of(scheduler: str, text: str) -> str:
    """The shell lines of a job file."""
    if scheduler == "slurm":
        return text
    job = yaml.safe_load(text)
    if scheduler == "skypilot":
        return job["run"]
    pod = job["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    return pod["containers"][0]["command"][2]


FAKE = """\
#!/bin/bash
echo "$(basename "$0") $*" >> "$LOG"
case "$(basename "$0") $1" in
  "srun "*) while [[ $1 == --* ]]; do shift; done; exec "$@";;
  "scontrol show") echo first; echo second;;
  "fitune prepare") mkdir -p data/no_robots; touch data/no_robots/train.jsonl;;
  "fitune train") mkdir -p runs/job /outputs-of-test 2>/dev/null; touch runs/job/run.yaml; exit ${CODE:-0};;
esac
"""


@pytest.mark.parametrize("scheduler", WANTED)
@pytest.mark.parametrize("nodes", [1, 2])
def test_the_shell_lines_prepare_once_train_and_then_go_on(scheduler, nodes, submit, tmp_path):
    submit(scheduler, "--dry-run", "--gpus", "8", "--nodes", str(nodes), *WANTED[scheduler])
    [file] = (tmp_path / "runs").glob("job.*")
    script = script_of(scheduler, file.read_text()).replace("/outputs/job", "runs/job")
    (tmp_path / "bin").mkdir()
    for name in ("fitune", "srun", "scontrol"):
        (tmp_path / "bin" / name).write_text(FAKE)
        (tmp_path / "bin" / name).chmod(0o755)
    ranks = {"SLURM_NODEID": "1", "SKYPILOT_NODE_RANK": "1", "JOB_COMPLETION_INDEX": "1"}
    environment = {
        "PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin", "LOG": str(tmp_path / "log"), "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "x", "SKYPILOT_NODE_IPS": "first\nsecond", **ranks,
    }  # fmt: skip

    def start(code: int) -> list[str]:
        (tmp_path / "log").write_text("")
        done = subprocess.run(["bash", "-c", script], env=environment | {"CODE": str(code)}, cwd=tmp_path, check=False)
        assert done.returncode == code
        return [line for line in (tmp_path / "log").read_text().splitlines() if not line.startswith("srun")]

    first, second = start(75), start(0)
    heads = {"kubernetes": "fitune-job-nodes-0-0.fitune-job"}
    ports = {"slurm": "20007"}
    place = f" --machine-rank 1 --main-process-ip {heads.get(scheduler, 'first')} --main-process-port "
    place = f"{place}{ports.get(scheduler, '29500')}" if nodes > 1 else ""
    machines = " --machines 2" if nodes > 1 else ""
    assert "fitune prepare llama3_8b_qlora" in first
    assert f"fitune train llama3_8b_qlora{machines} --output runs/job{place}" in first
    assert [line for line in second if line.startswith("fitune")] == [f"fitune train --resume runs/job{place}"]
    assert ("scontrol requeue 7" in first) == (scheduler == "slurm") and "scontrol requeue 7" not in second


def test_a_slurm_job_is_not_started_again_where_a_node_failed(submit, tmp_path):
    """The others are told to stop then, and end with 75."""
    script = submit("slurm", "--dry-run", "--gpus", "8", "--nodes", "2").stdout
    (tmp_path / "bin").mkdir()
    for name in ("fitune", "srun", "scontrol"):
        (tmp_path / "bin" / name).write_text(FAKE)
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "runs/job/machines").mkdir(parents=True)
    environment = {"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin", "LOG": str(tmp_path / "log"), "CODE": "75"}
    environment |= {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "x"}
    for failed, requeued in ((False, True), (True, False)):
        if failed:
            (tmp_path / "runs/job/machines/1.failed").touch()
        (tmp_path / "log").write_text("")
        assert subprocess.run(["bash", "-c", script], env=environment, cwd=tmp_path, check=False).returncode == 75
        assert ("scontrol requeue 7" in (tmp_path / "log").read_text()) == requeued


def test_slurm_gets_a_log_file_with_spaces_and_percent_signs_as_one_word(submit):
    flags = ("--dry-run", "--gpus", "8", "--output", "my 50%j")
    assert "#SBATCH --output='my 50%%j-slurm.log'\n" in submit("slurm", *flags).stdout


@pytest.mark.parametrize("scheduler", ["slurm", "kubernetes"])
@pytest.mark.parametrize(
    ("setup", "said"),
    [
        ("source nowhere/activate", "error: the set-up failed: source nowhere/activate"),
        ("true && false; # two lines'\nA=$(false)", "error: the set-up failed: true && false; # two lines'"),
        ("export A=1;", "error: no command fitune here: --setup puts it in PATH"),
        ("", "error: no command fitune here: --setup puts it in PATH"),
    ],
    ids=["fails", "two lines", "without fitune", "none"],
)
def test_a_set_up_that_fails_ends_the_job_and_says_so(scheduler, setup, said, submit, tmp_path):
    text = submit(scheduler, "--dry-run", "--gpus", "1", "--setup", setup, *WANTED[scheduler]).stdout
    script = script_of(scheduler, text.partition("job file: ")[0])
    done = subprocess.run(
        ["bash", "-c", script], env={"PATH": "/usr/bin:/bin"}, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1 and said in done.stderr
    assert len([line for line in done.stderr.splitlines() if line.startswith("error")]) == 1


def test_a_set_up_puts_fitune_in_path(submit, tmp_path):
    (tmp_path / "bin").mkdir()
    for name in ("fitune", "srun"):
        (tmp_path / "bin" / name).write_text(FAKE)
        (tmp_path / "bin" / name).chmod(0o755)
    script = submit("slurm", "--dry-run", "--gpus", "1", "--setup", "export PATH=$PWD/bin:$PATH").stdout
    environment = {"PATH": "/usr/bin:/bin", "LOG": str(tmp_path / "log")}
    assert subprocess.run(["bash", "-c", script], env=environment, cwd=tmp_path, check=False).returncode == 0
    assert "fitune train llama3_8b_qlora --output runs/job" in (tmp_path / "log").read_text()


def test_a_job_ends_where_its_folder_is_not_seen(submit, tmp_path):
    script = submit("slurm", "--dry-run", "--gpus", "1").stdout.replace(f"cd {tmp_path}", "cd /nowhere")
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "error: this node does not see the folder of the job" in done.stderr


def test_slurm_lets_all_nodes_save_when_the_first_has_ended(submit):
    text = submit("slurm", "--dry-run", "--gpus", "8", "--nodes", "2").stdout
    assert "srun --wait=120 " in text and "kill-on-bad-exit" not in text


def test_slurm_is_asked_for_nodes_gpus_time_and_a_signal_in_time(submit):
    flags = ("--nodes", "2", "--gpus", "4", "--hours", "1.5", "--partition", "gpu")
    text = submit("slurm", "--dry-run", *flags).stdout
    assert "--cpus-per-task=8 bash" in text and "--mem" not in text
    for line in ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=4", "--cpus-per-task=8", "--time=1:30:00",
                 "--signal=TERM@600", "--requeue", "--partition=gpu", "--open-mode=append"):  # fmt: skip
        assert f"#SBATCH {line}\n" in text


def test_a_short_slurm_job_is_not_told_to_end_as_it_starts(submit):
    text = submit("slurm", "--dry-run", "--gpus", "1", "--hours", "0.1").stdout
    assert "#SBATCH --time=0:06:00\n" in text and "#SBATCH --signal=TERM@180\n" in text


@pytest.mark.parametrize(("run", "name"), [("My run_2", "fitune-my-run-2"), ("a" * 80, "fitune-" + 43 * "a")])
def test_runs_of_one_recipe_have_names_of_their_own_on_kubernetes(run, name, submit):
    """Else `kubectl apply` would take the second for a change of the first."""
    words = ("--dry-run", "--gpus", "1", "--output", f"runs/{run}", *WANTED["kubernetes"])
    assert yaml.safe_load(submit("kubernetes", *words).stdout)["metadata"]["name"] == name


def test_cores_and_ram_are_asked_for(submit):
    """Slurm gives a job one core and little RAM unless it is asked, and the run is held to them."""
    planned = ("--dry-run", "--profile", "fsdp_4x24gb")
    offloaded = ("--dry-run", "--profile", "single_gpu_8gb", "--memory", "20", "--cpus", "6")
    text = submit("slurm", *planned).stdout
    assert "#SBATCH --cpus-per-task=8\n" in text and "#SBATCH --mem=12G\n" in text
    text = submit("slurm", *offloaded).stdout
    assert "#SBATCH --cpus-per-task=6\n" in text and "#SBATCH --mem=20G\n" in text
    resources = yaml.safe_load(submit("skypilot", *planned, *WANTED["skypilot"]).stdout)["resources"]
    assert (resources["cpus"], resources["memory"]) == ("8+", "12+")
    job = yaml.safe_load(submit("kubernetes", *planned, *WANTED["kubernetes"]).stdout)
    pod = job["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    wanted = {"requests": {"cpu": 8, "memory": "12Gi"}, "limits": {"nvidia.com/gpu": 4}}
    assert pod["containers"][0]["resources"] == wanted
    unknown = submit("slurm", *planned, "--set", "base.model=nobody/knows").stdout
    assert "#SBATCH --cpus-per-task=8\n" in unknown and "--mem" not in unknown


def test_skypilot_keeps_checkpoints_where_they_outlive_the_machine(submit):
    task = yaml.safe_load(submit("skypilot", "--dry-run", "--gpus", "8", *WANTED["skypilot"]).stdout)
    assert task["file_mounts"] == {"/outputs": {"source": "s3://mine", "mode": "MOUNT"}}
    assert "--output /outputs/job" in task["run"] and task["resources"]["accelerators"] == "H100:8"
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [75]


@pytest.mark.parametrize(
    ("gpu", "name"),
    [
        ("H100", "H100"), ("RTX 4090", "RTX4090"), ("rtx4090", "rtx4090"), ("NVIDIA GeForce RTX 4090", "RTX4090"),
        ("RTX-5090", "RTX5090"), ("RTX A6000", "RTXA6000"), ("A6000", "A6000"), ("RTX 6000 Ada", "RTX6000-Ada"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX6000-Ada"), ("RTX PRO 6000", "RTXPRO6000"), ("A100 80GB", "A100-80GB"),
        ("A100-80GB", "A100-80GB"), ("H100 NVL", "H100-NVL"), ("L40S", "L40S"), ("tpu-v6e", "tpu-v6e"),
    ],
)  # fmt: skip
def test_skypilot_is_asked_for_a_gpu_by_the_name_in_its_catalogue(gpu, name, submit):
    """catalogs/v8/common/accelerators.csv of SkyPilot's public catalogue; SkyPilot compares without the case."""
    task = yaml.safe_load(submit("skypilot", "--dry-run", *SKY, "--gpu", gpu).stdout)
    assert task["resources"]["accelerators"] == f"{name}:8"


@pytest.mark.parametrize("token", ["hf_mine", None])
def test_skypilot_is_given_the_token_of_this_environment_but_not_in_the_file(token, submit, tmp_path, monkeypatch):
    """SkyPilot hides secrets in its logs; Llama 3 is gated."""
    (tmp_path / "sky").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "sky").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("HF_TOKEN", token) if token else monkeypatch.delenv("HF_TOKEN", raising=False)
    said = submit("skypilot", "--gpus", "1", *WANTED["skypilot"]).stdout
    assert said == f"jobs launch --yes {'--secret HF_TOKEN ' if token else ''}runs/job.sky.yaml\n"
    task = yaml.safe_load((tmp_path / "runs/job.sky.yaml").read_text())
    assert task["secrets"] == {"HF_TOKEN": ""} and "envs" not in task


def test_a_kubernetes_job_that_was_interrupted_starts_again_and_counts_as_no_failure(submit):
    spec = yaml.safe_load(submit("kubernetes", "--dry-run", "--gpus", "8", *WANTED["kubernetes"]).stdout)["spec"]
    job = spec["replicatedJobs"][0]["template"]["spec"]
    assert job["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [75]
    [again] = spec["failurePolicy"]["rules"]
    assert again["action"] == "RestartJobSetAndIgnoreMaxRestarts"
    assert again["onJobFailureReasons"] == ["PodFailurePolicy", "DeadlineExceeded"], "by a signal, or after its hours"
    pod = job["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] == 600
    assert {"name": "shared-memory", "mountPath": "/dev/shm"} in pod["containers"][0]["volumeMounts"]


def test_a_folder_with_another_run_is_refused(submit):
    """The job would go on with that run, whatever is asked; with its own settings it may go on."""
    flags = ("--dry-run", "--gpus", "1")
    submit("slurm", *flags)
    run = runs.resolve("llama3_8b_qlora", "single_gpu", ("training.max_steps=9",), "runs/job")
    run.folder.mkdir(parents=True)
    (run.folder / "run.yaml").write_text(runs.dump(run))
    assert "runs/job holds a run with other settings (training)" in submit("slurm", *flags, code=2).stderr
    submit("slurm", *flags, "--set", "training.max_steps=9")


def test_what_sets_up_a_job_does_so_where_it_trains(submit):
    """SkyPilot's set-up is another shell."""
    said = submit("skypilot", "--dry-run", "--gpus", "8", *WANTED["skypilot"], "--setup", "source env/bin/activate")
    run = yaml.safe_load(said.stdout)["run"]
    assert run.index("source env/bin/activate") < run.index("command -v fitune") < run.index("fitune prepare")


def test_a_profile_says_how_many_gpus_each_node_has(submit):
    sets = ("--profile", "fsdp_4x48gb", "--set", "training.max_steps=9", "--set", "profile.micro_batch=1")
    text = submit("slurm", "--dry-run", *sets, "--set", "method=full", "--set", "lora=null").stdout
    assert "#SBATCH --gpus-per-node=4\n" in text and "--profile fsdp_4x48gb" in text
    assert "prepare llama3_8b_qlora --set training.max_steps=9 --set method=full" in text
    two_machines = ("--profile", "fsdp_full_16x80gb", "--nodes", "2", "--set", "method=full", "--set", "lora=null")
    batch = ("--set", "global_batch_size=16")
    assert "#SBATCH --gpus-per-node=8\n" in submit("slurm", "--dry-run", *two_machines, *batch).stdout
    by_profile = submit("slurm", "--dry-run", *two_machines[:2], *two_machines[4:], *batch).stdout
    assert "#SBATCH --nodes=2\n" in by_profile and '--machine-rank "$SLURM_NODEID"' in by_profile


@pytest.mark.parametrize(
    ("scheduler", "flags", "said"),
    [
        ("slurm", (), "give --gpus, the GPUs of each node, or a --profile"),
        ("slurm", ("--gpus", "1"), "sbatch: no such command here; --dry-run writes the job file only"),
        ("slurm", ("--profile", "fsdp_2x40gb", "--nodes", "2"), "has num_machines 1; make them equal"),
        ("skypilot", ("--gpus", "1"), "--on skypilot needs --gpu: the GPU model"),
        ("skypilot", ("--gpus", "1", "--gpu", "L4"), "--on skypilot needs --bucket: storage for checkpoints"),
        ("kubernetes", ("--gpus", "1"), "--on kubernetes needs --image: a container image with fitune"),
        (
            "kubernetes",
            ("--gpus", "1", "--image", "x", "--output", "/tmp/run"),
            "--output /tmp/run: a pod keeps what lies",
        ),
        ("slurm", ("--gpus", "1", "--set", "sede=1"), "did you mean 'seed'?"),
        ("slurm", ("--profile", "fsdp_2x40gb", "--gpus", "4"), "--gpus 4: the profile takes 2 on each node; leave out"),
        ("slurm", ("--profile", "cpu_2proc", "--gpus", "4"), "--gpus 4: the profile takes 0 on each node; leave out"),
        ("slurm", ("--gpus", "1", "--bucket", "s3://x"), "--bucket is for skypilot: leave it out with --on slurm"),
        ("slurm", ("--gpus", "1", "--image", "x"), "--image is for skypilot and kubernetes: leave it out"),
        ("kubernetes", ("--gpus", "1", "--gpu", "L4"), "--gpu is for skypilot: leave it out with --on kubernetes"),
        ("skypilot", ("--gpus", "1", "--partition", "x"), "--partition is for slurm: leave it out"),
        ("skypilot", ("--gpus", "1", "--hours", "8"), "--hours is for slurm and kubernetes: leave it out"),
        ("skypilot", (*SKY, "--gpu", "H100:8"), "--gpu H100:8: give the model alone, --gpu 'H100' --gpus 8\n"),
        ("skypilot", (*SKY, "--gpu", "2x RTX 4090"), "use --gpu 'RTX 4090' --gpus 2"),
        ("skypilot", (*SKY, "--gpu", "H100,A100"), "--gpu takes one model, given is 'H100,A100'"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(scheduler, flags, said, submit, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    result = submit(scheduler, *flags, code=2)
    assert said in result.stderr and result.stderr.count("\n") == 1
    assert not (tmp_path / "runs").exists()


FP8 = ("--set", "profile.compute=fp8")
ON_THE_PROFILE = ("--profile", "single_gpu")


@pytest.mark.parametrize(
    ("gpu", "flags", "said"),
    [
        ("V100", ("--gpus", "8"), "V100 has compute capability 7.0 and no bf16, in which fitune trains"),
        ("T4", ON_THE_PROFILE, "T4 has compute capability 7.5 and no bf16"),
        ("A100-80GB", ("--gpus", "8", *FP8), "--gpu A100-80GB: profile.compute fp8 needs compute capability 8.9, A100"),
        ("A100", (*ON_THE_PROFILE, *FP8), "A100 has 8.0; ask for one that has it, such as L4, L40S or H100, or use"),
        ("A100", ON_THE_PROFILE, None),
        ("H100", (*ON_THE_PROFILE, *FP8), None),
        ("L4", ("--gpus", "1", *FP8), None),
        ("TPU-v5", ("--gpus", "1", *FP8), None),
    ],
)
def test_a_gpu_that_cannot_compute_so_is_not_asked_for(gpu, flags, said, submit, tmp_path):
    words = ("--gpu", gpu, "--bucket", "s3://mine", "--dry-run", *flags)
    result = submit("skypilot", *words, code=2 if said else 0)
    assert (said or "") in result.stderr and (tmp_path / "runs").exists() == (said is None)


def test_a_refusal_of_the_scheduler_is_told(submit, tmp_path, monkeypatch):
    (tmp_path / "sbatch").write_text("#!/bin/sh\necho 'sbatch: error: invalid partition' >&2; exit 1\n")
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert (
        "sbatch refused runs/job.sbatch: sbatch: error: invalid partition"
        in submit("slurm", "--gpus", "1", code=1).stderr
    )
