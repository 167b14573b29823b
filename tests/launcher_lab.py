"""`ray up`, `ray submit`, `ray rsync-down` and `ray down` on hosts of their own, on one machine.

Each host is a network, process and mount namespace of Linux with an address, a home directory, a
/tmp/ray and an sshd: `ray stop` ends the Ray of its own host alone, and killing a host's first
process is a power cut. The whole lab is in namespaces too: when its first process ends, the kernel
ends all others. Needs root and Debian's openssh-server, rsync and iproute2. `.ci/launcher` runs it;
by hand:

    unshare --net --pid --mount --fork --mount-proc --kill-child python tests/launcher_lab.py DIR
"""

import getpass
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import yaml

from qvpo_rllib.tuning.results import FINISHED, read_rows, read_trials

STARTED = time.monotonic()
ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
LAPTOP_IP, HEAD_IP, ROLLOUT_IP = "10.77.0.254", "10.77.0.1", "10.77.0.2"
USER_HASH = hashlib.sha256(getpass.getuser().encode()).hexdigest()[:10]
# Ray's sessions, what it knows of clusters, its SSH connections: of each host, not the machine's.
PRIVATE = ["/tmp/ray", f"/tmp/ray_ssh_{USER_HASH}"]
TRAIN = [
    "train", "--env", "InvertedPendulum-v5", "--num-env-runners", "2", "--eval-interval", "384",
    "--set", "warmup_steps=100", "--set", "batch_size=16", "--set", "hidden=16",
]  # fmt: skip

SWEEP_FILE, SWEEP, NUM_TRIALS = "k_sweep.yaml", "k_sweep-smoke", 4

HOST = """
set -e
hostname "$NAME"
mount --bind "$LAB/passwd-$NAME" /etc/passwd
mount -t tmpfs tmpfs /run
mkdir /run/sshd
for directory in $PRIVATE; do mount -t tmpfs tmpfs "$directory"; done
ip link set lo up
until ip link show eth0 >/dev/null 2>&1; do sleep 0.1; done
ip address add "$ADDRESS/24" dev eth0
ip link set eth0 up
ip route add default via "$GATEWAY"
exec /usr/sbin/sshd -D -e -f "$LAB/sshd_config" -o ListenAddress="$ADDRESS"
"""


class Lab:
    """A laptop (this process), a head and a rollout node on one bridge."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.home = directory / "laptop"
        self.config = directory / "cluster.yaml"
        self.share = directory / "share"  # every host sees it here, as it would a network's disk
        self.hosts: dict[str, subprocess.Popen[bytes]] = {}

    def build(self) -> None:
        self.home.mkdir(parents=True)
        for private in PRIVATE:
            Path(private).mkdir(exist_ok=True)
            run("mount", "-t", "tmpfs", "tmpfs", private)
        (self.directory / "hosts").write_text(
            f"127.0.0.1 localhost\n{LAPTOP_IP} laptop\n{HEAD_IP} head\n{ROLLOUT_IP} rollout\n"
        )
        run("mount", "--bind", str(self.directory / "hosts"), "/etc/hosts")
        for name in ("host_key", "key"):
            run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.directory / name))
        (self.directory / "sshd_config").write_text(
            f"HostKey {self.directory}/host_key\n"
            f"AuthorizedKeysFile {self.directory}/key.pub\n"
            "PermitRootLogin prohibit-password\nStrictModes no\nPidFile none\n"
        )
        run("ip", "link", "set", "lo", "up")
        run("ip", "link", "add", "bridge", "type", "bridge")
        run("ip", "address", "add", f"{LAPTOP_IP}/24", "dev", "bridge")
        run("ip", "link", "set", "bridge", "up")
        self.start_host("head", HEAD_IP)
        self.start_host("rollout", ROLLOUT_IP)
        self._write_config()

    def start_host(self, name: str, address: str) -> None:
        home = self.directory / name
        home.mkdir(exist_ok=True)
        # What setup_node.sh does where there is a network; the package is the copy of file_mounts.
        (home / ".bashrc").write_text(
            f"export PATH={BIN}:$PATH PYTHONPATH={home}/qvpo_rllib RAY_AUTH_MODE=token\n"
        )
        users = Path("/etc/passwd").read_text().splitlines()
        users = [f"root:x:0:0:root:{home}:/bin/bash" if u.startswith("root:") else u for u in users]
        (self.directory / f"passwd-{name}").write_text("\n".join(users) + "\n")
        environment = {
            "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
            "LAB": str(self.directory),
            "NAME": name,
            "ADDRESS": address,
            "GATEWAY": LAPTOP_IP,
            "PRIVATE": " ".join(PRIVATE),
        }
        with (self.directory / f"{name}.log").open("ab") as log:
            self.hosts[name] = subprocess.Popen(
                ["unshare", "--net", "--pid", "--mount", "--uts", "--fork", "--mount-proc",
                 "--kill-child", "bash", "-c", HOST],
                env=environment, stdout=log, stderr=log,
            )  # fmt: skip
        run("ip", "link", "add", name, "type", "veth", "peer", "name", "eth0",
            "netns", str(self._first_process(name)))  # fmt: skip
        run("ip", "link", "set", name, "master", "bridge", "up")

    def kill_host(self, name: str) -> None:
        """A power cut: the kernel ends all processes of the namespace with its first."""
        os.kill(self._first_process(name), 9)
        self.hosts.pop(name).wait()

    def ray(self, *arguments: str) -> str:
        """The output of a `ray` command on the laptop, in the package's folder."""
        return self.finish(self.start_ray(*arguments))

    def finish(self, process: subprocess.Popen[str], timeout_s: float = 300) -> str:
        try:
            output, _ = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            output = process.communicate()[0]
        command = "ray " + " ".join(process.args[1:])
        say(f"$ {command}")
        if process.returncode != 0:
            print(output)
            raise AssertionError(f"exit code {process.returncode}: {command}")
        return output

    def start_ray(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [str(BIN / "ray"), *arguments],
            cwd=ROOT,
            env={
                **os.environ,
                "HOME": str(self.home),
                "PATH": f"{BIN}:{os.environ['PATH']}",
                "RAY_USAGE_STATS_ENABLED": "0",
                "RAY_AUTH_MODE": "token",
                "TMPDIR": str(self.home),  # of `ray up`'s notes on clusters
            },
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def submit(self, name: str, env_steps: int) -> str:
        """Trains run `name` on the cluster to its end; the command's output."""
        return self.finish(self.start_submit(name, env_steps))

    def start_submit(self, name: str, env_steps: int) -> subprocess.Popen[str]:
        arguments = [*TRAIN, "--env-steps", str(env_steps), "--run-dir", f"runs/{name}"]
        return self.start_ray("submit", str(self.config), "cluster/submit.py", "--", *arguments)

    def start_sweep(self, file: str = SWEEP_FILE) -> subprocess.Popen[str]:
        """The command of cluster/README.md; the file is in the head's home or the package there."""
        return self.start_ray(
            "submit", str(self.config), "cluster/submit.py", "--",
            "tune", file, "--smoke", "--storage", str(self.share),
        )  # fmt: skip

    def fetch(self) -> Path:
        """The folder that now holds the runs, by name."""
        results = self.directory / "results"
        results.mkdir(exist_ok=True)
        self.ray("rsync-down", str(self.config), "~/runs/", str(results))
        return results

    def wait_for_nodes(self, number: int) -> None:
        """Until the head knows that many; the command's time limit is the limit."""
        (self.directory / "wait.py").write_text(
            "import ray, time\nray.init('auto', logging_level='ERROR')\n"
            f"while sum(n['Alive'] for n in ray.nodes()) < {number}: time.sleep(1)\n"
        )
        self.ray("exec", str(self.config), f"python {self.directory}/wait.py")

    def _first_process(self, name: str) -> int:
        unshare = self.hosts[name].pid
        children = Path(f"/proc/{unshare}/task/{unshare}/children")
        while not children.read_text().strip():
            time.sleep(0.05)
        return int(children.read_text().split()[0])

    def _write_config(self) -> None:
        """cluster/local.yaml with this lab's addresses, one CPU a node, and no installation."""
        config: dict[str, Any] = yaml.safe_load((ROOT / "cluster" / "local.yaml").read_text())
        config["cluster_name"] = "lab"
        config["provider"] |= {"head_ip": HEAD_IP, "worker_ips": [ROLLOUT_IP]}
        config |= {"min_workers": 1, "max_workers": 1}
        config["auth"] = {"ssh_user": "root", "ssh_private_key": str(self.directory / "key")}
        config["setup_commands"] = [c for c in config["setup_commands"] if "setup_node" not in c]
        for commands in ("head_start_ray_commands", "worker_start_ray_commands"):
            config[commands] = [
                c.replace("ray start", "ray start --num-cpus=1 --object-store-memory=80000000")
                for c in config[commands]
            ]
        self.config.write_text(yaml.safe_dump(config))


def say(text: str) -> None:
    """On the terminal, with the seconds since the start."""
    print(f"[{time.monotonic() - STARTED:.0f} s] {text}", flush=True)


def run(*command: str) -> None:
    subprocess.run(command, check=True)


def check_up_submit_down(lab: Lab) -> None:
    """A training on the head and on a node that Ray started itself; its results come back."""
    lab.ray("get-auth-token", "--generate")
    lab.ray("up", "-y", str(lab.config))
    lab.wait_for_nodes(2)
    lab.submit("b", 384)
    run_b = lab.fetch() / "b"
    first, last = (s["env_steps"] for s in snapshots(run_b))
    assert first == 0
    assert last >= 384  # and what was in flight
    for snapshot in snapshots(run_b):
        assert [w["hostname"] for w in snapshot["workers"]] == ["head", "rollout"]
        assert [w["node_ip"] for w in snapshot["workers"]] == [HEAD_IP, ROLLOUT_IP]
    say("passed: ray up, ray submit, ray rsync-down; workers on both nodes")


def check_sweep(lab: Lab) -> None:
    """Ctrl-C on the laptop in the middle of a sweep; the command again, and once more after."""
    part = lab.share / SWEEP / "qvpo"
    sweep = lab.start_sweep()
    wait_for(rf"[1-{NUM_TRIALS - 1}] of {NUM_TRIALS} trials finished", sweep)
    os.killpg(sweep.pid, signal.SIGINT)
    sweep.communicate(timeout=120)
    wait_until_gone("submit.py")
    before = read_trials(part)
    ended = [trial for trial, entry in before.items() if entry["status"] == FINISHED]
    assert 1 <= len(ended) < NUM_TRIALS
    rows = {trial: (part / "results" / f"{trial}.jsonl").read_bytes() for trial in ended}
    say(f"the laptop's command was interrupted; {len(ended)} of {NUM_TRIALS} trials had finished")

    output = lab.finish(lab.start_sweep())
    assert "Done." in output, output
    after = read_trials(part)
    assert [entry["status"] for entry in after.values()] == [FINISHED] * NUM_TRIALS
    for trial in ended:
        assert after[trial] == before[trial]
        assert (part / "results" / f"{trial}.jsonl").read_bytes() == rows[trial]
    for trial in after:
        assert [row["env_steps"] for row in read_rows(part, trial)] == [160, 320, 480]
    say("passed: the sweep went on; the trials that had finished were not touched")

    files = {path: path.stat().st_mtime_ns for path in lab.share.rglob("*") if path.is_file()}
    assert "Finished already" in lab.finish(lab.start_sweep())
    assert files == {p: p.stat().st_mtime_ns for p in lab.share.rglob("*") if p.is_file()}
    say("passed: submitted once more, the sweep is finished already")

    results = lab.directory / "results"
    results.mkdir(exist_ok=True)
    lab.ray("rsync-down", str(lab.config), f"{lab.share}/", str(results))
    hosts = {
        json.loads(line)["hostname"]
        for file in (results / SWEEP).rglob("result.json")
        for line in file.read_text().splitlines()
    }
    assert hosts == {"head", "rollout"}, hosts
    report = results / "report"
    run(sys.executable, "-m", "qvpo_rllib", "report", str(results / SWEEP), "--out", str(report))
    assert (report / "report.html").exists()
    say(f"passed: its trials ran on {' and '.join(sorted(hosts))}; results fetched, report made")


def check_own_sweep(lab: Lab) -> None:
    """An experiment file that `ray up` has not copied."""
    file = lab.directory / "my_sweep.yaml"
    file.write_text("name: mine\ntask: Hopper-v5\npreset: light\nseeds: [3]\nenv_steps: 50_000\n")
    lab.ray("rsync-up", str(lab.config), str(file), "~/my_sweep.yaml")
    assert "Done." in lab.finish(lab.start_sweep("my_sweep.yaml"))
    [trial] = read_trials(lab.share / "mine-smoke" / "qvpo").values()
    assert trial["status"] == FINISHED
    say("passed: ray rsync-up and a sweep of one's own")


def check_lost_rollout_node(lab: Lab) -> None:
    """The training goes on without it; when the machine is there again, Ray takes it back."""
    training = lab.start_submit("c", 1920)
    wait_for("evaluation at 384 env steps", training)
    lab.kill_host("rollout")
    say("the rollout node has no power any more")
    lab.finish(training, timeout_s=400)
    last = snapshots(lab.fetch() / "c")[-1]
    assert last["env_steps"] >= 1920
    assert [w["hostname"] for w in last["workers"]] == ["head"]
    say("passed: the training ended with the workers that were left")
    lab.start_host("rollout", ROLLOUT_IP)
    lab.wait_for_nodes(2)
    say("passed: the rollout node, switched on again, is part of the cluster again")


def check_lost_head(lab: Lab) -> None:
    """The same two commands again: the run goes on from its last checkpoint."""
    training = lab.start_submit("d", 1920)
    wait_for("evaluation at 768 env steps", training)
    lab.kill_host("head")
    say("the head has no power any more")
    training.kill()
    training.communicate()
    lab.start_host("head", HEAD_IP)
    lab.ray("up", "-y", str(lab.config))
    lab.wait_for_nodes(2)
    output = lab.submit("d", 1920)
    first = re.search(r"([\d,]+)/1,920 env steps", output)
    run_d = lab.fetch() / "d"
    starts = json.loads((run_d / "run.json").read_text())["starts"]
    rows = [json.loads(line) for line in (run_d / "metrics.jsonl").read_text().splitlines()]
    evaluated = [row["env_steps"] for row in rows if "evaluation/return_mean" in row]
    assert first is not None
    assert int(first[1].replace(",", "")) >= 384, "it began anew"
    assert len(starts) == 2
    assert evaluated == [384, 768, 1152, 1536, 1920], evaluated
    say(f"passed: the run went on after the head was lost ({first[0]} shown first)")


def check_down(lab: Lab) -> None:
    lab.ray("down", "-y", str(lab.config))
    assert not [p for p in psutil.process_iter(["name"]) if p.info["name"] == "gcs_server"
                and p.status() != psutil.STATUS_ZOMBIE]  # fmt: skip
    say("passed: ray down; no head is left")


def snapshots(run_path: Path) -> list[dict[str, Any]]:
    return list(json.loads((run_path / "workers.json").read_text()))


def wait_for(pattern: str, process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if re.search(pattern, line):
            say(re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line).strip())
            return
    raise AssertionError(f"the command ended without {pattern!r}")


def wait_until_gone(word: str, timeout_s: float = 120) -> None:
    """Until no process on any host has the word in its command line."""
    deadline = time.monotonic() + timeout_s
    while any(word in " ".join(p.info["cmdline"] or []) for p in psutil.process_iter(["cmdline"])):
        assert time.monotonic() < deadline, f"{word} still runs"
        time.sleep(0.5)


CHECKS = (
    check_up_submit_down,
    check_sweep,
    check_own_sweep,
    check_lost_rollout_node,
    check_lost_head,
    check_down,
)

if __name__ == "__main__":
    lab = Lab(Path(sys.argv[1]).absolute())
    lab.build()
    for check in CHECKS:
        check(lab)
